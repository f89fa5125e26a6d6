"""The ops ``tuckaway::quantize_int8`` and ``quantize_int8_out``, and the launch of their kernel."""

from __future__ import annotations

from functools import lru_cache

import torch

from tuckaway_kernels.launching import Launch, has_ptx, kernel_reciprocal_table
from tuckaway_kernels.library import define
from tuckaway_kernels.quantize_int8 import reference

LONGEST = 16384
"""Columns a program holds in registers; longer rows are read twice, the second time from the cache."""

TILE = 4096
"""Weights a program takes at least, so that narrow matrices give it several rows."""


def launch(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the rows of ``w`` on its device; see `reference.quantize_int8`."""
    reference.check_int8(w)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    absmax = torch.empty(reference.rows_of(w), dtype=torch.float32, device=w.device)
    launch_out(w, codes, absmax)
    return codes, absmax


def launch_out(w: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    """Quantize the rows of ``w`` into ``codes`` and ``absmax``; see `reference.quantize_int8_out`."""
    reference.check_int8(w, codes, absmax)
    if w.numel() == 0:
        absmax.zero_()
        return
    columns = w.shape[-1]
    launch = _prepared(w.numel() // columns, columns)
    launch(w.contiguous(), codes, absmax, kernel_reciprocal_table(w.device))


@lru_cache(maxsize=1024)
def _prepared(rows: int, columns: int) -> Launch:
    from tuckaway_kernels.quantize_int8.kernel import quantize_int8_kernel

    width = min(1 << (columns - 1).bit_length(), LONGEST)
    height = max(TILE // width, 1)
    constants = {"ROWS": height, "COLUMNS": width, "LONG": columns > width, "PTX": has_ptx()}
    warps = 8 if width * height >= 8192 else 4
    return Launch(quantize_int8_kernel, (-(-rows // height), 1, 1), (rows, columns), constants, warps=warps)


def _fake(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    reference.check_int8(w)
    rows = 1
    for size in w.shape[:-1]:
        rows = rows * size
    return w.new_empty(w.shape, dtype=torch.int8), w.new_empty((rows,), dtype=torch.float32)


def _fake_out(w: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    reference.check_int8(w)


define(
    "quantize_int8(Tensor w) -> (Tensor codes, Tensor absmax)",
    reference=reference.quantize_int8,
    fake=_fake,
    triton=launch,
)
define(
    "quantize_int8_out(Tensor w, Tensor(a!) codes, Tensor(b!) absmax) -> ()",
    reference=reference.quantize_int8_out,
    fake=_fake_out,
    triton=launch_out,
)
