"""The ops ``tuckaway::quantize_4bit`` and ``quantize_4bit_out``, and the launch of their kernel."""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from tuckaway_kernels.codebooks import FP4_ORDER, FP4_THRESHOLDS, NF4_THRESHOLDS, check_4bit
from tuckaway_kernels.launching import Launch, has_ptx, kernel_reciprocal_table
from tuckaway_kernels.library import define
from tuckaway_kernels.quantize_4bit import reference

TILE = 4096
"""Weights a program takes."""

WARPS = 4


@cache
def cell_table(format: str, device: torch.device) -> torch.Tensor:
    """Return what the kernel looks up for a normalized weight y, by the cell of 1/16 it lies in.

    Cell k holds the y (nf4; |y| for fp4) whose 16 y rounds to k; no cell holds more than one threshold. An entry
    is that threshold's bits (infinity if there is none) above ``low | high << 8``: the codes at or below it and
    above it. nf4's ``high`` is always ``low + 1`` and left out; its cells are shifted by 16 so that they count
    from 0. Entry 63 is where NaN arrives: code 0.

    Returns:
        int64 ``[64]``; shared, not to be written to.
    """
    nf4 = format == "nf4"
    limits = NF4_THRESHOLDS if nf4 else torch.tensor(FP4_THRESHOLDS).tolist()
    order = tuple(range(16)) if nf4 else FP4_ORDER
    shift = 16 if nf4 else 0
    infinity = 0x7F800000
    entries = [infinity << 32] * 64
    for index in range(shift + 17):
        lower = (index - shift - 0.5) / 16
        below = sum(t < lower for t in limits)
        inside = [t for t in limits[below:] if t <= lower + 1 / 16]
        bits, low, high = infinity, order[below], 0
        if inside:
            bits = int(torch.tensor(inside[0]).view(torch.int32)) & 0xFFFFFFFF
            high = 0 if nf4 else order[below + 1]
        entries[index] = bits << 32 | high << 8 | low
    signed = [e - (1 << 64) if e >= 1 << 63 else e for e in entries]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def launch(x: torch.Tensor, format: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize ``x`` on its device; see `reference.quantize_4bit`."""
    check_4bit(format, blocksize, x.dtype)
    n = x.numel()
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=x.device)
    _launch(x.contiguous(), format, blocksize, codes, absmax)
    return codes, absmax


def launch_out(
    x: torch.Tensor, format: str, blocksize: int, codes: torch.Tensor, absmax: torch.Tensor
) -> None:
    """Quantize ``x`` into ``codes`` and ``absmax``; see `reference.quantize_4bit_out`."""
    check_4bit(format, blocksize, x.dtype, x.numel(), codes, absmax)
    _launch(x.contiguous(), format, blocksize, codes, absmax)


def _launch(x: torch.Tensor, format: str, blocksize: int, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    n = x.numel()
    if n == 0:
        return
    tables = cell_table(format, x.device), kernel_reciprocal_table(x.device)
    _prepared(n, format, blocksize)(x, codes, absmax, *tables)


@lru_cache(maxsize=1024)
def _prepared(n: int, format: str, blocksize: int) -> Launch:
    from tuckaway_kernels.quantize_4bit.kernel import quantize_4bit_kernel

    constants = {
        "BLOCKSIZE": blocksize,
        "BLOCKS": TILE // blocksize,
        "FP4": format == "fp4",
        "EVEN": n % TILE == 0,
        "PTX": has_ptx(),
    }
    return Launch(quantize_4bit_kernel, (-(-n // TILE), 1, 1), (n,), constants, warps=WARPS)


def _fake(x: torch.Tensor, format: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    check_4bit(format, blocksize, x.dtype)
    n = x.numel()
    return (
        x.new_empty(((n + 1) // 2,), dtype=torch.uint8),
        x.new_empty(((n + blocksize - 1) // blocksize,), dtype=torch.float32),
    )


def _fake_out(
    x: torch.Tensor, format: str, blocksize: int, codes: torch.Tensor, absmax: torch.Tensor
) -> None:
    check_4bit(format, blocksize, x.dtype)


define(
    "quantize_4bit(Tensor x, str format, int blocksize) -> (Tensor codes, Tensor absmax)",
    reference=reference.quantize_4bit,
    fake=_fake,
    triton=launch,
)
define(
    "quantize_4bit_out(Tensor x, str format, int blocksize, Tensor(a!) codes, Tensor(b!) absmax) -> ()",
    reference=reference.quantize_4bit_out,
    fake=_fake_out,
    triton=launch_out,
)
