"""The numbers behind the codes: codebooks and decision thresholds of nf4, fp4 and the 8-bit dynamic map.

All are bitsandbytes' values, in fp32, because a checkpoint stores codes and not weights: another last digit here
would decode every stored weight differently.

- nf4: 16 quantiles of a normal distribution, index order ascending (QLoRA, arXiv 2305.14314, appendix E).
  A weight takes the code whose interval between *midpoints* it lies in.
- fp4: sign, and a magnitude of 8 (indices 0-7), not in ascending order. Its thresholds are *not* midpoints: they
  are the literals compiled into bitsandbytes' CUDA kernels, up to 14 units in the last place away from them.
- dynamic: 256 values, ascending, used for the scales of nested (double) quantization (arXiv 2110.02861).
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch

NF4: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""nf4 codebook: value of code 0 to 15."""

NF4_THRESHOLDS: Final = (
    -0.8480964303016663, -0.6106328964233398, -0.4599952697753906, -0.33967941999435425, -0.23460739850997925,
    -0.13791173696517944, -0.045525018125772476, 0.03979014977812767, 0.1202552542090416, 0.2035212516784668,
    0.2920137643814087, 0.3893125355243683, 0.5016633868217468, 0.6427869200706482, 0.8614784178118011,
)  # fmt: skip
"""A normalized weight x gets the nf4 code i for which exactly i of these are < x (a tie stays below).

Midpoints of the codebook, written out as the fp32 numbers compiled into bitsandbytes' CUDA kernels. Four
midpoints (0, 8, 12, 14) fall exactly between two fp32 numbers; the decimal literals in bitsandbytes' source round
the first and third of them down and the other two up. Only weights that lie on a threshold see the difference."""

FP4_MAGNITUDES: Final = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
)  # fmt: skip
"""fp4 magnitude of code 0 to 7; codes 8 to 15 are the same, negated."""

FP4: Final = FP4_MAGNITUDES + tuple(-m for m in FP4_MAGNITUDES)
"""fp4 codebook: value of code 0 to 15; code 8 decodes to -0.0, as CUDA does it."""

FP4_THRESHOLDS: Final = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
"""|x| gets the magnitude FP4_ORDER[i] for which exactly i of these (rounded to fp32) are < |x|."""

FP4_ORDER: Final = (0, 1, 6, 7, 4, 5, 2, 3)
"""fp4 magnitude codes in ascending order of their value."""

CODEBOOKS: Final = {"nf4": NF4, "fp4": FP4}


BLOCKSIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that may share one 4-bit scale."""

NESTED_BLOCKSIZE: Final = 256
"""Scales that share one nested scale."""

WEIGHT_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that weights are quantized from and decoded to."""


def check_4bit(
    format: str,
    blocksize: int,
    dtype: torch.dtype,
    n: int | None = None,
    codes: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> None:
    """Raise ValueError unless the arguments of a 4-bit op go together.

    Args:
        format: ``"nf4"`` or ``"fp4"``.
        blocksize: one of BLOCKSIZES.
        dtype: of the weights.
        n: number of weights; decides the sizes of codes and absmax.
        codes: contiguous uint8 with ``(n + 1) // 2`` elements.
        absmax: contiguous fp32 with ``ceil(n / blocksize)`` elements.
        out: contiguous, of that dtype, with ``n`` elements.
    """
    if format not in CODEBOOKS:
        raise ValueError(f"format must be 'nf4' or 'fp4', not {format!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be a power of two from 32 to 4096, not {blocksize}")
    check_dtype(dtype)
    if n is not None and codes is not None:
        check_storage("codes", codes, torch.uint8, (n + 1) // 2)
    if n is not None and absmax is not None:
        check_storage("absmax", absmax, torch.float32, -(-n // blocksize))
    if n is not None and out is not None:
        check_storage("out", out, dtype, n)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError unless ``dtype`` is one that weights may have."""
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weights must be float32, float16 or bfloat16, not {dtype}")


def check_storage(name: str, tensor: torch.Tensor, dtype: torch.dtype, numel: int) -> None:
    """Raise ValueError unless ``tensor`` is contiguous, of ``dtype`` and has ``numel`` elements."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}")
    if tensor.numel() != numel:
        raise ValueError(f"{name} must have {numel} elements, not {tensor.numel()}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def _dynamic_map() -> tuple[float, ...]:
    """The signed dynamic map of bitsandbytes: 7 decades, each with twice the steps of the one below."""
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2
        decade = (10.0 ** (exponent - 6) * means).tolist()
        values += decade + [-v for v in decade]
    return tuple(sorted(values))


@cache
def codebook(format: str, device: torch.device) -> torch.Tensor:
    """Return the 16 values of ``format`` as fp32 ``[16]`` on ``device``; shared, not to be written to."""
    return torch.tensor(CODEBOOKS[format], dtype=torch.float32, device=device)


@cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """Return the 256 ascending values of the signed dynamic map as fp32 ``[256]``; shared, not to be written to."""
    return torch.tensor(_dynamic_map(), dtype=torch.float32, device=device)


@cache
def dynamic_thresholds(device: torch.device) -> torch.Tensor:
    """Return the 255 decision thresholds of the dynamic map as fp32 ``[255]``.

    A value gets the code i for which exactly i thresholds are < it. bitsandbytes finds the nearest code by a binary
    search from 127 in steps of 64 to 1 and keeps, on a tie, the entry the search ended on. That entry's index is
    always even (127 plus or minus 64, 32, ..., 1), so a tie goes to the even neighbour: the threshold between an
    odd and the next even entry lies one representable number below their midpoint.
    """
    values = dynamic_map(torch.device("cpu"))
    middle = (values[:-1] + values[1:]) * 0.5
    below = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
    odd = torch.arange(255) % 2 == 1
    return torch.where(odd, below, middle).to(device)
