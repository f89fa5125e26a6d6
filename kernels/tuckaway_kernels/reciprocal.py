"""The reciprocal that NVIDIA GPUs compute (``rcp.approx.ftz.f32``, MUFU.RCP), bit for bit, in plain torch.

A normalized weight is ``weight * reciprocal(absmax)``, and where it falls next to a decision threshold the last bit of
that reciprocal decides the code. bitsandbytes compiles its kernels with ``--use_fast_math``, which makes the
reciprocal the hardware's approximation; so must everything be that wants to give the same codes: with an IEEE division
98 of 156,000 fp4 decisions on bf16 weights differ, one in 1,600.

The approximation is the IEEE reciprocal plus -1, 0 or +1 unit in the last place, and which of them depends on the
23 bits of the divisor's mantissa alone. ``data/mufu_rcp.xz`` holds that difference for each of the 2**23
mantissas (int8; 112 KB compressed, 8 MiB in memory), read from an H100. It is loaded at the first use, in about
30 ms.

FTZ: subnormal divisors count as zero (their reciprocal is infinite), subnormal reciprocals become zero.
"""

from __future__ import annotations

import lzma
from functools import cache
from pathlib import Path
from typing import Final

import torch

SMALLEST_NORMAL: Final = torch.finfo(torch.float32).tiny
"""2**-126; anything nearer to zero is subnormal."""

_TABLE = Path(__file__).parent / "data" / "mufu_rcp.xz"
_MANTISSA: Final = 0x7FFFFF


@cache
def reciprocal_table(device: torch.device) -> torch.Tensor:
    """Return MUFU.RCP minus the IEEE reciprocal, in units in the last place, by mantissa of the divisor.

    Returns:
        int8 ``[2**23]`` on ``device``; shared, not to be written to.
    """
    if device.type != "cpu":
        return reciprocal_table(torch.device("cpu")).to(device)
    raw = lzma.decompress(_TABLE.read_bytes())
    return torch.frombuffer(bytearray(raw), dtype=torch.int8)


def flush(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` (fp32) with its subnormal numbers replaced by zeros of their sign, as a GPU's ``.ftz`` does."""
    return torch.where(x.abs() < SMALLEST_NORMAL, x * 0.0, x)


def multiply(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return ``mul.rn.ftz.f32(x, y)``: subnormal operands and products are zeros of their sign.

    A GPU rounds a product to 24 bits and then asks whether that is below 2**-126. A CPU, to which numbers below
    2**-126 are 2**-149 apart, rounds up from 2**-126 - 2**-150 on, a GPU from 2**-126 - 2**-151 on (found on an H100 in
    fp4 weights that spread over all exponents: one in 10**6 lies between the two).
    """
    product = flush(x) * flush(y)
    tiny = (x.double() * y.double()).abs() < SMALLEST_NORMAL - 2.0**-151
    return torch.where(tiny, product * 0.0, product)


def reciprocal(x: torch.Tensor) -> torch.Tensor:
    """Return ``rcp.approx.ftz.f32(x)`` for every element.

    Args:
        x: fp32, any shape. Zeros and subnormal numbers give infinity of their sign, infinities zero.

    Returns:
        fp32 of the same shape.
    """
    exact = torch.reciprocal(flush(x))
    mantissa = x.contiguous().view(torch.int32).bitwise_and(_MANTISSA).reshape(-1)
    error = torch.index_select(reciprocal_table(x.device), 0, mantissa).view(x.shape)
    nudged = (exact.view(torch.int32) + error).view(torch.float32)
    return flush(torch.where(exact.isfinite() & (exact != 0), nudged, exact))
