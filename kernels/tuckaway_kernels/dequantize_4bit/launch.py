"""The ops ``tuckaway::dequantize_4bit`` and ``dequantize_4bit_out``, and the launch of their kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from tuckaway_kernels.codebooks import check_4bit, check_dtype, codebook
from tuckaway_kernels.dequantize_4bit import reference
from tuckaway_kernels.launching import Launch, has_ptx
from tuckaway_kernels.library import define

TILE = 4096
"""Weights a program decodes."""

WARPS = 4


def launch(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    format: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Decode ``codes`` on their device; see `reference.dequantize_4bit`."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    launch_out(codes, absmax, format, blocksize, out)
    return out


def launch_out(
    codes: torch.Tensor, absmax: torch.Tensor, format: str, blocksize: int, out: torch.Tensor
) -> None:
    """Decode ``codes`` into ``out``; see `reference.dequantize_4bit_out`."""
    n = out.numel()
    check_4bit(format, blocksize, out.dtype, n, codes, absmax, out)
    if n == 0:
        return
    _prepared(n, blocksize)(codes, absmax, out, codebook(format, out.device))


@lru_cache(maxsize=1024)
def _prepared(n: int, blocksize: int) -> Launch:
    from tuckaway_kernels.dequantize_4bit.kernel import dequantize_4bit_kernel

    constants = {
        "BLOCKSIZE": blocksize,
        "BLOCKS": TILE // blocksize,
        "EVEN": n % TILE == 0,
        "PTX": has_ptx(),
    }
    return Launch(dequantize_4bit_kernel, (-(-n // TILE), 1, 1), (n,), constants, warps=WARPS)


def _fake(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    format: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    check_4bit(format, blocksize, dtype)
    return codes.new_empty(shape, dtype=dtype)


def _fake_out(
    codes: torch.Tensor, absmax: torch.Tensor, format: str, blocksize: int, out: torch.Tensor
) -> None:
    check_dtype(out.dtype)


define(
    "dequantize_4bit(Tensor codes, Tensor absmax, str format, int blocksize, SymInt[] shape, "
    "ScalarType dtype) -> Tensor",
    reference=reference.dequantize_4bit,
    fake=_fake,
    triton=launch,
)
define(
    "dequantize_4bit_out(Tensor codes, Tensor absmax, str format, int blocksize, Tensor(a!) out) -> ()",
    reference=reference.dequantize_4bit_out,
    fake=_fake_out,
    triton=launch_out,
)
