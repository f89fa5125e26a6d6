"""Nested scales: the offset and the codes in two launches without a word to the host, and the way back in one.

The offset is needed before the first code, so a first launch leaves 256 float64 sums, always of the same pieces
in the same order, and every program of the second adds them up for itself. The scales of 8192x8192 weights are 4
MB and still lie in the second-level cache; a launch takes about as long as memory takes to answer a few times, so a
program of the first loads its whole piece at once.

The code of y is guessed by arithmetic (the dynamic map has 7 decades of 1, 2, ..., 64 equal steps), to within one, and
two thresholds decide: 2 loads, where a binary search needs 8 that wait for each other. The whole kernel is 80
instructions a scale, 1.3 a weight at blocksize 64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tuckaway_kernels.arithmetic import magnitude, multiply, reciprocal
from tuckaway_kernels.overlap import after_launch_before, begin_next_launch


@triton.jit
def partial_sums_kernel(absmax, partial, n, each, TILE: tl.constexpr, OVERLAP: tl.constexpr):
    """Sum absmax fp32 [n] -> partial float64 [programs], program i summing ``each`` scales from ``i * each`` on.

    OVERLAP: the launch before this one, which wrote absmax, may still run; so may this one when the next begins.
    """
    program = tl.program_id(0)
    if OVERLAP:
        program = after_launch_before(begin_next_launch(program))
    first = program.to(tl.int64) * each
    last = tl.minimum(first + each, n)
    sums = tl.zeros([TILE], dtype=tl.float64)
    for start in range(first, last, TILE):
        place = start + tl.arange(0, TILE)
        sums += tl.load(absmax + place, mask=place < last, other=0.0).to(tl.float64)
    tl.store(partial + program, tl.sum(sums, axis=0))


@triton.jit
def encode_dynamic(y, thresholds):
    """Return the codes (int32, 0 to 255) of ``y`` in [-1, 1] (NaN: 0); ``thresholds`` fp32 [257], padded with inf."""
    a = tl.abs(y)
    width = tl.where(a > 1e-6, 2.0, 1.0)
    rate = tl.where(a > 1e-6, 2e5 / 0.9, 1e6 / 0.9)
    width = tl.where(a > 1e-5, 4.0, width)
    rate = tl.where(a > 1e-5, 4e4 / 0.9, rate)
    width = tl.where(a > 1e-4, 8.0, width)
    rate = tl.where(a > 1e-4, 8e3 / 0.9, rate)
    width = tl.where(a > 1e-3, 16.0, width)
    rate = tl.where(a > 1e-3, 1.6e3 / 0.9, rate)
    width = tl.where(a > 1e-2, 32.0, width)
    rate = tl.where(a > 1e-2, 3.2e2 / 0.9, rate)
    width = tl.where(a > 1e-1, 64.0, width)
    rate = tl.where(a > 1e-1, 64.0 / 0.9, rate)
    step = tl.floor(a * rate - width / 9.0)
    step = tl.where(step > 0.0, tl.where(step < width, step, width - 1.0), 0.0)  # NaN: 0
    index = (width + step).to(tl.int32)
    guess = tl.where(y > 0.0, 127 + index, 127 - index)
    code = guess - 1
    code += (y > tl.load(thresholds + guess)).to(tl.int32)
    code += (y > tl.load(thresholds + guess + 1)).to(tl.int32)
    return tl.where(y == y, code, 0)


@triton.jit
def quantize_nested_kernel(
    absmax,
    partial,
    codes,
    nested,
    offset,
    thresholds,
    table,
    n,
    PARTS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Quantize absmax fp32 [n] -> codes uint8 [n], nested fp32 [ceil(n / BLOCKSIZE)], offset fp32 [1].

    partial: float64 [PARTS] from `partial_sums_kernel`, which OVERLAP lets run still when this begins. thresholds: fp32
    [257]. table: of reciprocals.
    """
    program = tl.program_id(0)
    if OVERLAP:
        program = after_launch_before(program)
    # both loads are on their way before either is waited for; the difference is 0, but known after the wait only
    sums = tl.load(partial + (program - tl.program_id(0)) + tl.arange(0, PARTS))
    first = program.to(tl.int64) * (BLOCKS * BLOCKSIZE)
    left = tl.minimum(n - first, BLOCKS * BLOCKSIZE).to(tl.int32)
    block = tl.arange(0, BLOCKS)
    place = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    inside = place < left
    scales = tl.load(absmax + first + place, mask=inside, other=0.0)
    mean = (tl.sum(sums, axis=0) / n).to(tl.float32)
    if program == 0:
        tl.store(offset, mean)
    x = tl.where(inside, scales - mean, 0.0)
    scale = multiply(tl.max(magnitude(x, PTX), axis=1), 1.0, PTX)
    y = multiply(x, reciprocal(scale, table, PTX)[:, None], PTX)
    tl.store(codes + first + place, encode_dynamic(y, thresholds).to(tl.uint8), mask=inside)
    tl.store(nested + first // BLOCKSIZE + block, scale, mask=block * BLOCKSIZE < left)


@triton.jit
def dequantize_nested_kernel(
    codes,
    nested,
    offset,
    values,
    out,
    n,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Restore codes uint8 [n], nested fp32 [ceil(n / BLOCKSIZE)], offset fp32 [1] -> out fp32 [n].

    values: the dynamic map, fp32 [256].
    """
    first = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCKSIZE)
    left = tl.minimum(n - first, BLOCKS * BLOCKSIZE).to(tl.int32)
    block = tl.arange(0, BLOCKS)
    place = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    code = tl.load(codes + first + place, mask=place < left, other=0).to(tl.int32)
    scale = tl.load(nested + first // BLOCKSIZE + block, mask=block * BLOCKSIZE < left, other=0.0)
    product = multiply(
        tl.load(values + code), scale[:, None], PTX
    )  # rounded by itself: never fused with the sum
    tl.store(out + first + place, product + tl.load(offset), mask=place < left)
