"""Quantize to nf4 and fp4: one read of the weights, one write of codes and scales.

A program takes ``BLOCKS`` blocks of weights. Counting the thresholds below each weight (15 compares) would cost
more than the memory traffic: an H100 has room for about 24 instructions a weight at 3 TB/s. Instead the cell of
1/16 that ``y`` lies in is found by adding ``1.5 * 2**23``, which leaves ``round(16 y)`` in the low bits; a table
gives the one threshold that may lie in that cell and the code below it, and one exact comparison decides. NaN
(0 * inf in a block of zeros) arrives at an entry with code 0.

The table is looked up with ``tl.gather``: 8192x8192 bf16 to nf4 on an H100 takes 61 us so (floor 57), 70 to 85 us
with loads through the first-level cache, and 108 to 120 us with four dependent comparisons.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tuckaway_kernels.arithmetic import magnitude, multiply, reciprocal


@triton.jit
def encode(y, cells, BLOCKS: tl.constexpr, BLOCKSIZE: tl.constexpr, FP4: tl.constexpr):
    """Return the codes (int32, 0 to 15) of normalized weights ``y``; ``cells`` is `launch.cell_table`."""
    if FP4:
        t = tl.abs(y)
        shifted = t * 16.0 + 12582912.0
    else:
        t = y
        shifted = t * 16.0 + 12582928.0
    cell = tl.reshape(shifted.to(tl.int32, bitcast=True) & 63, [BLOCKS * BLOCKSIZE])
    entries = tl.load(cells + tl.arange(0, 64))
    limits = (entries >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    limit = tl.reshape(tl.gather(limits, cell, 0), [BLOCKS, BLOCKSIZE])
    low = tl.reshape(tl.gather(entries.to(tl.int32), cell, 0), [BLOCKS, BLOCKSIZE])
    if FP4:  # noqa: SIM108 - a choice at compile time
        code = (low >> tl.where(t > limit, 8, 0)) & 15 | tl.where(y < 0.0, 8, 0)
    else:
        code = low + (t > limit).to(tl.int32)
    return code


@triton.jit
def quantize_4bit_kernel(
    x,
    codes,
    absmax,
    cells,
    table,
    n,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    FP4: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
):
    """Quantize x [n] fp32, fp16 or bf16 -> codes uint8 [(n + 1) // 2], absmax fp32 [ceil(n / BLOCKSIZE)].

    EVEN: n is a multiple of BLOCKS * BLOCKSIZE. cells, table: `launch.cell_table`, reciprocal table.
    """
    TILE: tl.constexpr = BLOCKS * BLOCKSIZE
    HALF: tl.constexpr = BLOCKSIZE // 2
    first = tl.program_id(0).to(tl.int64) * TILE
    block = tl.arange(0, BLOCKS)
    place = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    left = tl.minimum(n - first, TILE).to(tl.int32)
    if EVEN:
        weights = tl.load(x + first + place).to(tl.float32)
    else:
        weights = tl.load(x + first + place, mask=place < left, other=0.0).to(tl.float32)
    scale = multiply(tl.max(magnitude(weights, PTX), axis=1), 1.0, PTX)
    y = multiply(weights, reciprocal(scale, table, PTX)[:, None], PTX)
    high, low = tl.split(tl.reshape(encode(y, cells, BLOCKS, BLOCKSIZE, FP4), [BLOCKS, HALF, 2]))
    packed = (high << 4 | low).to(tl.uint8)
    if EVEN:
        tl.store(codes + first // 2 + byte, packed)
        tl.store(absmax + first // BLOCKSIZE + block, scale)
    else:
        tl.store(codes + first // 2 + byte, packed, mask=byte * 2 < left)
        tl.store(absmax + first // BLOCKSIZE + block, scale, mask=block * BLOCKSIZE < left)
