"""The ops ``tuckaway::dequantize_int8`` and ``dequantize_int8_out``, and the launch of their kernel."""

from __future__ import annotations

from functools import lru_cache

import torch

from tuckaway_kernels.codebooks import check_dtype
from tuckaway_kernels.dequantize_int8 import reference
from tuckaway_kernels.launching import Launch
from tuckaway_kernels.library import define

TILE = 4096
"""Weights a program decodes."""

WARPS = 4


def launch(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Decode ``codes`` on their device; see `reference.dequantize_int8`."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    launch_out(codes, absmax, out)
    return out


def launch_out(codes: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> None:
    """Decode ``codes`` into ``out``; see `reference.dequantize_int8_out`."""
    reference.check_int8_codes(codes, absmax, out)
    if codes.numel() == 0:
        return
    columns = codes.shape[-1]
    _prepared(codes.numel() // columns, columns)(codes, absmax, out)


@lru_cache(maxsize=1024)
def _prepared(rows: int, columns: int) -> Launch:
    from tuckaway_kernels.dequantize_int8.kernel import dequantize_int8_kernel

    width = min(1 << (columns - 1).bit_length(), TILE)
    height = TILE // width
    across = -(-columns // width)
    constants = {"INVERSE_127": reference.INVERSE_127, "ROWS": height, "COLUMNS": width}
    grid = -(-rows // height) * across, 1, 1
    return Launch(dequantize_int8_kernel, grid, (rows, columns, across), constants, warps=WARPS)


def _fake(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    check_dtype(dtype)
    return codes.new_empty(codes.shape, dtype=dtype)


def _fake_out(codes: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> None:
    check_dtype(out.dtype)


define(
    "dequantize_int8(Tensor codes, Tensor absmax, ScalarType dtype) -> Tensor",
    reference=reference.dequantize_int8,
    fake=_fake,
    triton=launch,
)
define(
    "dequantize_int8_out(Tensor codes, Tensor absmax, Tensor(a!) out) -> ()",
    reference=reference.dequantize_int8_out,
    fake=_fake_out,
    triton=launch_out,
)
