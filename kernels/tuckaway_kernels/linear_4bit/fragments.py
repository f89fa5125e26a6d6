"""Multiply few rows of ``x`` by a 4-bit matrix on tensor cores, decoding straight into the fragments they take.

``mma.m16n8k16`` takes its left operand, here 16 rows of the matrix, as pairs of columns spread over the lanes of a
warp; which columns these are is free as long as the right operand, x, agrees. A lane takes 16 neighbouring weights of
each block of 64, so its codes are 8 bytes and its values of x 32 bytes, one or two loads each; and a byte of codes,
looked up in the table (`table`), is a pair as the tensor core wants it. Ordinary instructions have 1.5 to do for a
weight, whatever the number of rows of x. A block's products are added with unscaled codes in fp32, then scaled.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from tuckaway_kernels.linear_4bit.kernel import load_offset, load_scale, rows_together
from tuckaway_kernels.linear_4bit.table import fill_table, look_up
from tuckaway_kernels.overlap import after_launch_before, begin_next_launch


def _fragments() -> str:
    """$0..$15 = left operands of 4 steps, from two words of row g ($16, $17), two of row g + 8; $20: lane's offset."""
    lines = ["{ .reg .b32 s, at;", "mov.u32 at, tuckaway_table;"]
    for step in range(4):
        half = (0, 1) if step % 2 == 0 else (2, 3)
        lines += look_up(f"${16 + step // 2}", "$20", [f"${4 * step}", f"${4 * step + 2}"], half)
        lines += look_up(f"${18 + step // 2}", "$20", [f"${4 * step + 1}", f"${4 * step + 3}"], half)
    return "\n".join([*lines, "}"])


def _multiply() -> str:
    """$0..$3 = products of the fragments $4..$19 and the pairs of x $20..$27."""
    lines = ["{ .reg .f32 z;", "mov.f32 z, 0f00000000;"]
    for step in range(4):
        left = ", ".join(f"${4 + 4 * step + i}" for i in range(4))
        before = "$0, $1, $2, $3" if step else "z, z, z, z"
        lines.append(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, "
            f"{{{left}}}, {{${20 + 2 * step}, ${21 + 2 * step}}}, {{{before}}};"
        )
    return "\n".join([*lines, "}"])


FRAGMENTS = tl.constexpr(_fragments())
FRAGMENT_TYPES = tl.constexpr(",".join(["=&r"] * 16 + ["r"] * 5))
FRAGMENT_DTYPES = tl.constexpr((tl.int32,) * 16)
MULTIPLY = tl.constexpr(_multiply())
MULTIPLY_TYPES = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 24))
MULTIPLY_DTYPES = tl.constexpr((tl.float32,) * 4)


@triton.jit
def decode_block(low, high, lane):
    """Two words of codes each, of rows g and g + 8 (g: the lane's number / 4) -> left operands of 4 steps, 16 int32."""
    return tl.inline_asm_elementwise(
        FRAGMENTS, FRAGMENT_TYPES, low + high + (lane,), dtype=FRAGMENT_DTYPES, is_pure=True, pack=1
    )


@triton.jit
def multiply_block(left, x):
    """Products of a block of 16 rows (from `decode_block`) and 8 rows of x: 4 fp32 a thread, as tensor cores give them.

    x: 8 pairs of fp16.
    """
    return tl.inline_asm_elementwise(
        MULTIPLY, MULTIPLY_TYPES, left + x, dtype=MULTIPLY_DTYPES, is_pure=True, pack=1
    )


@triton.jit
def lane_of(value, source):
    """``value`` of the lane ``source`` of the warp."""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
        "=f,f,r",
        [value, source],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def two_words(codes, at, mask, EVEN: tl.constexpr):
    """The words at ``at`` [THREADS] and after them: two int32 [THREADS]."""
    places = codes + at[:, None] + tl.arange(0, 2)[None, :]
    if EVEN:
        pair = tl.load(places, eviction_policy="evict_first")
    else:
        pair = tl.load(places, mask=mask[:, None], other=0, eviction_policy="evict_first")
    return tl.split(pair)


@triton.jit
def four_words(places, mask, THREADS: tl.constexpr, EVEN: tl.constexpr):
    """The int32 at ``places`` [THREADS, 4]: four [THREADS]."""
    words = tl.load(places) if EVEN else tl.load(places, mask=mask[:, None], other=0)
    even, odd = tl.split(tl.reshape(words, [THREADS, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def load_codes(
    codes,
    scales,
    nested,
    offset,
    dynamic,
    row,
    rows,
    block,
    blocks,
    lane,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PER_SCALE: tl.constexpr,
    NESTED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Words of BLOCKS blocks from ``block`` on of ROWS rows 8 apart; and scales, each lane that of block + lane % 4."""
    words = ()
    factors = ()
    quarter = lane % 4
    for r in tl.static_range(ROWS):
        at = (row + 8 * r).to(tl.int64) * blocks + block
        there = row + 8 * r < rows
        for b in tl.static_range(BLOCKS):
            words = words + two_words(codes, (at + b) * 8 + 2 * quarter, there & (block + b < blocks), EVEN)
        # of a block that is not there the scale is 0 and x is 0
        which = quarter % BLOCKS
        factors = factors + (
            load_scale(
                scales,
                nested,
                offset,
                dynamic,
                (at + which) // PER_SCALE,
                there & (block + which < blocks),
                NESTED,
            ),
        )
    return words, factors


@triton.jit
def fragment_kernel(
    x,
    powers,
    codes,
    scales,
    nested,
    offset,
    dynamic,
    bias,
    out,
    m,
    rows,
    cols,
    split_steps,
    WARPS: tl.constexpr,
    ACROSS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    FP4: tl.constexpr,
    EVEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Take x from `order_rows_kernel`, as int32 of two fp16, with its powers; codes as int32 of eight.

    OVERLAP: the launch before this one, which wrote x, may still run; codes are read before that is waited for.
    out [m, rows], or fp32 [SPLIT, m, rows] if SPLIT > 1. A warp takes 8 * ROWS rows of the matrix (ROWS: 2 or 4) and
    8 * TILES rows of x, BLOCKS blocks of 64 columns a step; ACROSS of the WARPS warps of a program take different rows,
    the others different steps, of the ``split_steps`` that are the program's share. cols is a multiple of 64; EVEN: and
    every program has all its rows and steps.
    """
    THREADS: tl.constexpr = 32 * WARPS
    DEEP: tl.constexpr = WARPS // ACROSS
    PER_SCALE: tl.constexpr = BLOCKSIZE // 64
    thread = tl.arange(0, THREADS)
    lane = thread % 32
    group = lane // 4
    warp = thread // 32
    blocks = cols // 64
    # neighbouring programs take different columns, so that those a multiprocessor has at once, which on an H100 are
    # 132 apart, take the same and find each other's x in the first-level cache
    part = tl.program_id(0) % SPLIT
    first_row = tl.program_id(0) // SPLIT * (ACROSS * 8 * ROWS)
    row = first_row + warp % ACROSS * (8 * ROWS) + group
    x_tiles = tl.num_programs(1) * TILES
    begin = part * split_steps
    end = tl.minimum(begin + split_steps, (blocks + BLOCKS * DEEP - 1) // (BLOCKS * DEEP))
    deep = warp // ACROSS
    zero = tl.zeros([THREADS], dtype=tl.float32)
    sums = ()
    for _ in tl.static_range(2 * TILES * ROWS):
        sums = sums + (zero,)
    block = (begin * DEEP + deep) * BLOCKS
    offset = load_offset(offset, NESTED)
    words, factors = load_codes(
        codes,
        scales,
        nested,
        offset,
        dynamic,
        row,
        rows,
        block,
        blocks,
        lane,
        ROWS,
        BLOCKS,
        PER_SCALE,
        NESTED,
        EVEN,
    )
    table = fill_table(THREADS, FP4)
    # rows of x that are not there are not read, but the last again; their products are not written
    there = tl.minimum(group, m - 1 - tl.program_id(1) * 8) if TILES == 1 else group
    x_lane = there * 4 + lane % 4
    if OVERLAP:
        x_lane = begin_next_launch(after_launch_before(x_lane))
    x_lane *= 4  # last, so that Triton sees that four words can be loaded at once
    x_lane += tl.program_id(1) * (TILES * 256)
    for step in tl.range(begin, end, num_stages=1):
        block = (step * DEEP + deep) * BLOCKS
        # the last step loads once more what it has
        following = tl.where(step + 1 < end, block + DEEP * BLOCKS, block)
        next_words, next_factors = load_codes(
            codes,
            scales,
            nested,
            offset,
            dynamic,
            row,
            rows,
            following,
            blocks,
            lane,
            ROWS,
            BLOCKS,
            PER_SCALE,
            NESTED,
            EVEN,
        )
        for b in tl.static_range(BLOCKS):
            left = ()
            scale = ()
            for pair in tl.static_range(ROWS // 2):
                left = left + decode_block(
                    (words[4 * BLOCKS * pair + 2 * b], words[4 * BLOCKS * pair + 2 * b + 1]),
                    (words[(4 * pair + 2) * BLOCKS + 2 * b], words[(4 * pair + 2) * BLOCKS + 2 * b + 1]),
                    table,
                )
                scale = scale + (
                    lane_of(factors[2 * pair], lane // 4 * 4 + b),
                    lane_of(factors[2 * pair + 1], lane // 4 * 4 + b),
                )
            added = ()
            inside = block + b < blocks
            # one address a block: the rest is in the offsets of the loads
            x_at = x + ((block + b) * (x_tiles * 256) + x_lane)[:, None] + tl.arange(0, 4)[None, :]
            for tile in tl.static_range(TILES):
                values = four_words(x_at + tile * 256, inside, THREADS, EVEN) + four_words(
                    x_at + (tile * 256 + 128), inside, THREADS, EVEN
                )
                for pair in tl.static_range(ROWS // 2):
                    product = multiply_block(left[16 * pair : 16 * pair + 16], values)
                    added = added + (
                        sums[4 * (tile * (ROWS // 2) + pair)] + product[0] * scale[2 * pair],
                        sums[4 * (tile * (ROWS // 2) + pair) + 1] + product[1] * scale[2 * pair],
                        sums[4 * (tile * (ROWS // 2) + pair) + 2] + product[2] * scale[2 * pair + 1],
                        sums[4 * (tile * (ROWS // 2) + pair) + 3] + product[3] * scale[2 * pair + 1],
                    )
            sums = added
        words, factors = next_words, next_factors
    place = tl.arange(0, ACROSS * 32)
    lane_row = first_row + place // 32 * (8 * ROWS) + place % 32 // 4
    lane_x = tl.program_id(1) * (8 * TILES) + place % 4 * 2
    # few sums a thread at once, so that those of all warps fit in the shared memory that the table leaves
    COUNT: tl.constexpr = 2 * TILES * ROWS
    CHUNK: tl.constexpr = COUNT if COUNT * THREADS <= 4096 else 4096 // THREADS
    for chunk in tl.static_range(COUNT // CHUNK):
        result = rows_together(sums[chunk * CHUNK : chunk * CHUNK + CHUNK], CHUNK, THREADS)
        if DEEP > 1:  # the warps that took different steps, in order
            result = tl.sum(tl.reshape(result, [DEEP, ACROSS * 32, CHUNK]), axis=0)
        which = chunk * CHUNK + tl.arange(0, CHUNK)
        out_row = lane_row[:, None] + (which // 4 % (ROWS // 2) * 16 + which % 4 // 2 * 8)[None, :]
        out_x = lane_x[:, None] + (which // (2 * ROWS) * 8 + which % 2)[None, :]
        mask = (out_row < rows) & (out_x < m)
        result = result * tl.load(powers + part * m + out_x, mask=out_x < m, other=0.0)
        if BIAS and SPLIT == 1:
            result += tl.load(bias + out_row, mask=mask, other=0.0).to(tl.float32)
        at = out + (part.to(tl.int64) * m + out_x) * rows + out_row
        tl.store(at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def order_rows_kernel(
    x, out, powers, m, cols, share, COLUMNS: tl.constexpr, ONCE: tl.constexpr, OVERLAP: tl.constexpr
):
    """Bring x [m, cols] to fp16 in the order `fragment_kernel` reads it, with zeros for rows up to the whole grid.

    One program for each row and each ``share`` of its columns, which it divides by powers fp32 [shares, m]: 2**k that
    brings the largest to 2**3 .. 2**4. With 64 products of codes at most 1 a block, sums are taken in fp32 anyway;
    what matters is the margin above 2**-24, for values 2**27 times smaller than the largest. ONCE: a share has COLUMNS
    columns at most.

    The order: blocks of 64 columns, in them 8 rows of x at a time, in them the first 8 of each lane's 16 columns, then
    the others, so that a warp reads 512 bytes in a row.
    """
    row = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    if OVERLAP:
        row = begin_next_launch(after_launch_before(row))
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, cols)
    start = x + row.to(tl.int64) * cols
    there = tl.zeros([COLUMNS], dtype=tl.int32) + row < m
    value = tl.load(start + begin + column, mask=(begin + column < end) & there, other=0.0).to(tl.float32)
    largest = tl.abs(value)
    if not ONCE:
        for first in range(begin + COLUMNS, end, COLUMNS):
            more = tl.load(start + first + column, mask=(first + column < end) & there, other=0.0)
            largest = tl.maximum(largest, tl.abs(more.to(tl.float32)))
    exponent = (tl.max(largest, axis=0).to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 5), 254)
    factor = ((257 - exponent) << 23).to(tl.float32, bitcast=True)
    target = out + row // 8 * 512 + row % 8 * 32
    stride = tl.num_programs(0) // 8 * 512
    if ONCE:
        store_ordered(target, value * factor, begin + column, end, stride)
    else:
        for first in range(begin, end, COLUMNS):
            place = first + column
            value = tl.load(start + place, mask=(place < end) & there, other=0.0).to(tl.float32)
            store_ordered(target, value * factor, place, end, stride)
    power = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
    tl.store(powers + tl.program_id(1) * m + row, power, mask=row < m)


@triton.jit
def store_ordered(target, value, place, end, stride):
    """Store the values of these columns of a row; ``stride`` elements lie between blocks."""
    at = place // 64 * stride + place % 16 // 8 * 256 + place % 64 // 16 * 8 + place % 8
    tl.store(target + at, value.to(tl.float16), mask=place < end)
