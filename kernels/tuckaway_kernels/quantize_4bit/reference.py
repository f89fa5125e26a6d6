"""Quantize to nf4 and fp4 in plain torch: the definition of the op, and its path on the CPU.

Weights are taken in blocks of ``blocksize`` over the flat tensor; the last block may be short. For each block:

- ``absmax`` = largest absolute value (NaN ignored), fp32, zero if subnormal;
- ``y = weight * reciprocal(absmax)`` in fp32, where reciprocal is the GPU's (`tuckaway_kernels.reciprocal`), subnormal
  operands and results are zero, and a block of zeros gives 0 * inf = NaN;
- code = number of thresholds < y (nf4), or sign and number of thresholds < |y| (fp4). NaN takes code 0.

Two codes a byte: element 2i in the high nibble, 2i + 1 in the low one. An odd count is padded with a zero weight.

**How it is fast.** A comparison that writes booleans takes 0.30 ns a weight (2 cores), a bucketize 9.5 ns; but
``threshold_(y, t, v)``, which replaces everything <= t by v in place, is one vectorized pass of 0.075 ns. Going
up the 15 thresholds with replacements that lie above all of them (16 + code) turns y into its code: 1.5 ns for all.
The whole op runs at 350 to 430 M weights/s (bitsandbytes: 29) in pieces of 2**18 weights, which keeps the 2 MB of
temporaries in the second-level cache.
"""

from __future__ import annotations

from functools import cache

import torch

from tuckaway_kernels.codebooks import FP4_ORDER, FP4_THRESHOLDS, NF4_THRESHOLDS, check_4bit
from tuckaway_kernels.reciprocal import SMALLEST_NORMAL, multiply, reciprocal

PIECE = 1 << 18
"""Weights quantized at once: the ladder takes 1.77 ns a weight in pieces of 2**17, 1.52 in these, 1.50 in 2**19."""

_MARK = 16
"""Added to a code while unfinished values lie beside it: above every threshold, and a multiple of 16."""

_LARGEST_SUBNORMAL = 2.0**-126 - 2.0**-149  # of fp32


@cache
def ladder(format: str) -> tuple[tuple[float, int], ...]:
    """Return the steps from -1 to 1: ``(t, code)`` where code belongs to values <= t and > the t before it.

    The last step's t is above every normalized value. For fp4, whose thresholds are strict on |y|, the negative half
    has ``-|t|`` moved down by one fp32 number; its innermost step ends at the largest negative *normal* number,
    because a flushed value is a zero, and zeros are positive.
    """
    if format == "nf4":
        return (*((t, i) for i, t in enumerate(NF4_THRESHOLDS)), (2.0, 15))
    magnitudes = torch.tensor(FP4_THRESHOLDS, dtype=torch.float32)
    outward = torch.nextafter(-magnitudes, torch.tensor(-torch.inf)).tolist()
    negative = [(t, 8 + FP4_ORDER[i + 1]) for i, t in reversed(list(enumerate(outward)))]
    positive = [(t, FP4_ORDER[i]) for i, t in enumerate(magnitudes.tolist())]
    return (*negative, (-SMALLEST_NORMAL, 8), *positive, (2.0, FP4_ORDER[7]))


def quantize_4bit(x: torch.Tensor, format: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize ``x``.

    Args:
        x: fp32, fp16 or bf16 of any shape, ``n`` elements.
        format: ``"nf4"`` or ``"fp4"``.
        blocksize: weights sharing one scale, a power of two from 32 to 4096.

    Returns:
        codes uint8 ``[(n + 1) // 2]`` and absmax fp32 ``[ceil(n / blocksize)]``.

    Raises:
        ValueError: unknown format, blocksize or dtype.
    """
    check_4bit(format, blocksize, x.dtype)
    n = x.numel()
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=x.device)
    quantize_4bit_out(x, format, blocksize, codes, absmax)
    return codes, absmax


def quantize_4bit_out(
    x: torch.Tensor, format: str, blocksize: int, codes: torch.Tensor, absmax: torch.Tensor
) -> None:
    """Quantize ``x`` into ``codes`` and ``absmax`` (see `quantize_4bit`), which may be slices of bigger tensors.

    Raises:
        ValueError: unknown format, blocksize or dtype; codes or absmax of the wrong dtype or size.
    """
    check_4bit(format, blocksize, x.dtype, x.numel(), codes, absmax)
    flat, codes, absmax = x.reshape(-1), codes.view(-1), absmax.view(-1)
    n = flat.numel()
    step = PIECE // blocksize * blocksize
    size = min(step, -(-n // blocksize) * blocksize)
    device = x.device
    values = torch.empty(size, dtype=torch.float32, device=device)
    scratch = torch.empty(size, dtype=torch.float32, device=device)
    for start in range(0, n, step):
        piece = flat[start : start + step]
        blocks = -(-piece.numel() // blocksize)
        used = blocks * blocksize
        _quantize_piece(
            piece,
            format,
            values[:used].view(blocks, blocksize),
            scratch[:used].view(blocks, blocksize),
            codes[start // 2 : start // 2 + (piece.numel() + 1) // 2],
            absmax[start // blocksize : start // blocksize + blocks],
        )


def _quantize_piece(
    piece: torch.Tensor,
    format: str,
    values: torch.Tensor,
    scratch: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
) -> None:
    """Quantize ``piece`` [m] into codes and absmax, using fp32 ``values`` and ``scratch`` [blocks, blocksize]."""
    flat = values.view(-1)
    flat[: piece.numel()] = piece
    flat[piece.numel() :] = 0.0
    if piece.dtype != torch.float16:  # fp16's subnormal numbers are normal in fp32
        torch.ops.aten.hardshrink.out(values, _LARGEST_SUBNORMAL, out=values)
    torch.abs(values, out=scratch)
    torch.amax(scratch, 1, out=absmax)
    if bool(absmax.isnan().any()):
        torch.amax(scratch.nan_to_num_(nan=0.0, posinf=torch.inf), 1, out=absmax)
        unusual = True
    else:
        unusual = bool(((absmax == 0) | absmax.isinf()).any())
    scale = reciprocal(absmax)
    values.mul_(scale.unsqueeze(1))
    if format == "fp4" and float(absmax.max()) > 1.0:  # else no product of normal numbers comes near 2**-126
        _flush_exactly(piece, values, scale)
    if unusual:  # NaN takes code 0: nf4's lowest value, fp4's zero
        values.nan_to_num_(nan=-2.0 if format == "nf4" else 0.0)
    for limit, code in ladder(format):
        torch.threshold_(values, limit, _MARK + code)
    _pack(values, scratch, codes)


def _flush_exactly(piece: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> None:
    """Make zero what became -2**-126 in ``values`` by rounding: fp4 knows a sign, but a zero has none."""
    near = (values.view(-1)[: piece.numel()] == -SMALLEST_NORMAL).nonzero().view(-1)
    if near.numel():
        weights, scales = piece[near].float(), scale[near // values.shape[1]]
        values.view(-1)[near] = multiply(weights, scales)


def _pack(marked: torch.Tensor, scratch: torch.Tensor, codes: torch.Tensor) -> None:
    """Pack ``marked`` (fp32, 16 + code) into ``codes``, with ``scratch`` as room for the steps between.

    Two neighbours read as one little-endian 16-bit number are ``low + 256 * high``, and the byte wanted is
    ``16 * low + high``: 0.1 ns a weight, where slices ``[0::2]`` and ``[1::2]`` take 0.37.
    """
    n = marked.numel()
    room = scratch.view(-1).view(torch.uint8)
    single = room[:n]
    single.copy_(marked.view(-1))
    pairs = single.view(torch.int16)
    other = room[n : 2 * n].view(torch.int16)
    torch.bitwise_right_shift(pairs, 8, out=other)
    other.add_(pairs, alpha=16)
    codes.copy_(other[: codes.numel()])
    codes.sub_(_MARK)
