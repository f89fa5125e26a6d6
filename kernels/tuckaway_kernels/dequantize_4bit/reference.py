"""Decode nf4 and fp4 in plain torch: the definition of the op, and its path on the CPU.

``weight = codebook[code] * absmax[block]`` in fp32 (subnormal operands and results are zeros of their sign, as the GPU
computes it), then one rounding to the dtype asked for. Element 2i is the high nibble of byte i, 2i + 1 the low one.

**How it is fast.** A byte is looked up whole: 256 pairs of fp32 values, read as one int64 each, because a gather
of 8-byte elements takes 0.25 ns a weight and one of rows of two values 0.9. Pieces of 2**18 weights keep the
1.5 MB of temporaries in the second-level cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from tuckaway_kernels.codebooks import check_4bit, codebook
from tuckaway_kernels.reciprocal import SMALLEST_NORMAL, multiply

PIECE = 1 << 18
"""Weights decoded at once."""

_SMALLEST_CODE = 2.0**-8  # below every nonzero magnitude: 0.0052 for fp4, 0.0796 for nf4


@cache
def pair_table(format: str, device: torch.device) -> torch.Tensor:
    """Return the two fp32 values of each byte as one int64: ``[256]``; shared, not to be written to."""
    values = codebook(format, device)
    byte = torch.arange(256, device=device)
    return torch.stack([values[byte >> 4], values[byte & 15]], dim=1).view(torch.int64).view(-1)


def dequantize_4bit(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    format: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Decode ``codes``.

    Args:
        codes: uint8 with ``(n + 1) // 2`` elements.
        absmax: fp32 with ``ceil(n / blocksize)`` elements.
        format: ``"nf4"`` or ``"fp4"``.
        blocksize: weights sharing one scale.
        shape: of the result, ``n`` elements.
        dtype: of the result: fp32, fp16 or bf16.

    Raises:
        ValueError: unknown format, blocksize or dtype; codes or absmax of the wrong dtype or size.
    """
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    dequantize_4bit_out(codes, absmax, format, blocksize, out)
    return out


def dequantize_4bit_out(
    codes: torch.Tensor, absmax: torch.Tensor, format: str, blocksize: int, out: torch.Tensor
) -> None:
    """Decode ``codes`` into ``out``, contiguous, whose size decides ``n`` (see `dequantize_4bit`).

    Raises:
        ValueError: as `dequantize_4bit`; out not contiguous.
    """
    n = out.numel()
    check_4bit(format, blocksize, out.dtype, n, codes, absmax, out)
    flat = out.view(-1)
    codes = codes.view(-1)
    absmax = absmax.view(-1)
    table = pair_table(format, codes.device)
    size = min(PIECE, -(-n // blocksize) * blocksize)
    index = torch.empty(size // 2, dtype=torch.int32, device=codes.device)
    pairs = torch.empty(size // 2, dtype=torch.int64, device=codes.device)
    index.zero_()  # a short last block decodes to the end, whatever lies there
    for start in range(0, n, PIECE):
        piece = flat[start : start + PIECE]
        bytes_ = codes[start // 2 : start // 2 + (piece.numel() + 1) // 2]
        scales = absmax[start // blocksize : -(-(start + piece.numel()) // blocksize)]
        used = scales.numel() * blocksize
        index[: bytes_.numel()] = bytes_
        torch.index_select(table, 0, index[: used // 2], out=pairs[: used // 2])
        values = pairs[: used // 2].view(torch.float32).view(-1, blocksize)
        if bool(((scales.abs() < SMALLEST_NORMAL / _SMALLEST_CODE) & (scales != 0)).any()):
            values.copy_(multiply(values, scales.unsqueeze(1)))
        elif piece.dtype == torch.float32 and used == piece.numel():
            torch.mul(values, scales.unsqueeze(1), out=piece.view(-1, blocksize))
            continue
        else:
            values.mul_(scales.unsqueeze(1))
        piece.copy_(values.view(-1)[: piece.numel()])
