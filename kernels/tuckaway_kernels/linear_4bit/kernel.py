"""Multiply few rows of ``x`` by a 4-bit matrix in bitsandbytes' own layout, decoding in registers.

``gemv_kernel`` (1 to 4 rows of x) has no tensor cores: a thread takes 32 weights of a row (four words), decodes them to
fp16 pairs and multiplies them by pairs of x with two fp16 multiply-adds an instruction. The fp16 sums are 16 terms long
(error 4e-4 of the result, below the 1.7e-3 of rounding the result to bf16), then scaled and added in fp32. x is brought
to the range of fp16 by a power of two of each 32 values' own, so that nothing overflows and nothing is lost.

``mma_kernel`` (from 5 rows) multiplies a block's 64 unscaled codes by x with tensor cores, W as the left operand from
registers, and scales each block's product in fp32.

Both write fp32 partial sums where the columns are split among programs; ``combine_kernel`` adds them in a fixed order.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from tuckaway_kernels.linear_4bit.decode import (
    add_word,
    bf16_pair_magnitude,
    bytes_to_quad,
    fp16_pair_magnitude,
    scale_bf16_pair,
    scale_fp16_pair,
    sum_of_pair,
)


@triton.jit
def load_scale(scales, nested, offset, dynamic, block, mask, NESTED: tl.constexpr):
    """Scales of these blocks, fp32."""
    if NESTED:
        code = tl.load(scales + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(dynamic + code) * tl.load(nested + block // 256, mask=mask, other=0.0) + tl.load(
            offset
        )
    else:
        scale = tl.load(scales + block, mask=mask, other=0.0)
    return scale


@triton.jit
def four_words(words, HALVES: tl.constexpr):
    """Part [HALVES * 4] into its four [HALVES]: registers only."""
    even, odd = tl.split(tl.reshape(words, [HALVES, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def x_pairs(x, first, halves, HALVES: tl.constexpr, BF16: tl.constexpr):
    """32 values of x a thread as 16 words of two fp16, and the power of two they were divided by: [HALVES] each.

    The power is taken from the largest of the 32, which comes to 2**10 .. 2**11: 16 products add up to less than 2**15.
    """
    word = tl.arange(0, HALVES * 4)
    place = (first + word // 4) * 16 + word % 4
    mask = first + word // 4 < halves
    a0, a1, a2, a3 = four_words(tl.load(x + place, mask=mask, other=0), HALVES)
    b0, b1, b2, b3 = four_words(tl.load(x + place + 4, mask=mask, other=0), HALVES)
    c0, c1, c2, c3 = four_words(tl.load(x + place + 8, mask=mask, other=0), HALVES)
    d0, d1, d2, d3 = four_words(tl.load(x + place + 12, mask=mask, other=0), HALVES)
    if BF16:
        m0 = bf16_pair_magnitude(bf16_pair_magnitude(a0, a1), bf16_pair_magnitude(a2, a3))
        m1 = bf16_pair_magnitude(bf16_pair_magnitude(b0, b1), bf16_pair_magnitude(b2, b3))
        m2 = bf16_pair_magnitude(bf16_pair_magnitude(c0, c1), bf16_pair_magnitude(c2, c3))
        m3 = bf16_pair_magnitude(bf16_pair_magnitude(d0, d1), bf16_pair_magnitude(d2, d3))
        m = bf16_pair_magnitude(bf16_pair_magnitude(m0, m1), bf16_pair_magnitude(m2, m3))
        exponent = tl.maximum((m >> 7) & 0xFF, (m >> 23) & 0xFF)
        exponent = tl.minimum(tl.maximum(exponent, 12), 254)
        factor = ((264 - exponent) << 23).to(tl.float32, bitcast=True)
        back = ((exponent - 10) << 23).to(tl.float32, bitcast=True)
        a0 = scale_bf16_pair(a0, factor)
        a1 = scale_bf16_pair(a1, factor)
        a2 = scale_bf16_pair(a2, factor)
        a3 = scale_bf16_pair(a3, factor)
        b0 = scale_bf16_pair(b0, factor)
        b1 = scale_bf16_pair(b1, factor)
        b2 = scale_bf16_pair(b2, factor)
        b3 = scale_bf16_pair(b3, factor)
        c0 = scale_bf16_pair(c0, factor)
        c1 = scale_bf16_pair(c1, factor)
        c2 = scale_bf16_pair(c2, factor)
        c3 = scale_bf16_pair(c3, factor)
        d0 = scale_bf16_pair(d0, factor)
        d1 = scale_bf16_pair(d1, factor)
        d2 = scale_bf16_pair(d2, factor)
        d3 = scale_bf16_pair(d3, factor)
    else:
        m0 = fp16_pair_magnitude(fp16_pair_magnitude(a0, a1), fp16_pair_magnitude(a2, a3))
        m1 = fp16_pair_magnitude(fp16_pair_magnitude(b0, b1), fp16_pair_magnitude(b2, b3))
        m2 = fp16_pair_magnitude(fp16_pair_magnitude(c0, c1), fp16_pair_magnitude(c2, c3))
        m3 = fp16_pair_magnitude(fp16_pair_magnitude(d0, d1), fp16_pair_magnitude(d2, d3))
        m = fp16_pair_magnitude(fp16_pair_magnitude(m0, m1), fp16_pair_magnitude(m2, m3))
        exponent = tl.maximum((m >> 10) & 0x1F, (m >> 26) & 0x1F)
        factor = ((152 - exponent) << 23).to(tl.float32, bitcast=True)
        back = ((102 + exponent) << 23).to(tl.float32, bitcast=True)
        a0 = scale_fp16_pair(a0, factor)
        a1 = scale_fp16_pair(a1, factor)
        a2 = scale_fp16_pair(a2, factor)
        a3 = scale_fp16_pair(a3, factor)
        b0 = scale_fp16_pair(b0, factor)
        b1 = scale_fp16_pair(b1, factor)
        b2 = scale_fp16_pair(b2, factor)
        b3 = scale_fp16_pair(b3, factor)
        c0 = scale_fp16_pair(c0, factor)
        c1 = scale_fp16_pair(c1, factor)
        c2 = scale_fp16_pair(c2, factor)
        c3 = scale_fp16_pair(c3, factor)
        d0 = scale_fp16_pair(d0, factor)
        d1 = scale_fp16_pair(d1, factor)
        d2 = scale_fp16_pair(d2, factor)
        d3 = scale_fp16_pair(d3, factor)
    return (a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3), back


@triton.jit
def rows_together(parts, ROWS: tl.constexpr, HALVES: tl.constexpr):
    """ROWS tensors [HALVES] -> [HALVES, ROWS], in registers."""
    if ROWS == 1:
        result = tl.reshape(parts[0], [HALVES, 1])
    else:
        for _ in tl.static_range(tl.constexpr(ROWS.bit_length() - 1)):
            joined = ()
            for i in tl.static_range(len(parts) // 2):
                joined = joined + (tl.join(parts[i], parts[i + len(parts) // 2]),)
            parts = joined
        result = tl.reshape(parts[0], [HALVES, ROWS])
    return result


@triton.jit
def gemv_kernel(
    x,
    codes,
    scales,
    nested,
    offset,
    dynamic,
    bias,
    out,
    rows,
    cols,
    split_halves,
    ROWS: tl.constexpr,
    HALVES: tl.constexpr,
    M: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BF16: tl.constexpr,
    FP4: tl.constexpr,
    CHAINS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x [M, cols] as int32 of two values; codes as int32 of eight; out [M, rows], fp32 [SPLIT, M, rows] if SPLIT > 1.

    A program takes ROWS rows, and HALVES runs of 32 columns at a time, of the ``split_halves`` that are its share.
    HALVES is 32 for each warp: a thread takes one run. Rows come one after the other, so that few registers hold
    decoded weights.
    CHAINS: 1, or 2 for fp16 sums half as long. cols is a multiple of 32; rows, of ROWS; M * ROWS is a power of two.
    """
    PER_BLOCK: tl.constexpr = BLOCKSIZE // 32
    first_row = tl.program_id(0) * ROWS
    halves = cols // 32
    begin = tl.program_id(1) * split_halves
    end = tl.minimum(begin + split_halves, halves)
    zero = tl.zeros([HALVES], dtype=tl.float32)
    totals = ()
    for _ in tl.static_range(M * ROWS):
        totals = totals + (zero,)
    word = tl.arange(0, HALVES * 4)
    half = tl.arange(0, HALVES)
    for first in range(begin, end, HALVES):
        word_mask = first + word // 4 < end
        half_mask = first + half < end
        a, b, c, d, back = x_pairs(x, first, end, HALVES, BF16)
        backs = (back,)
        for k in tl.static_range(1, M):
            a_, b_, c_, d_, back = x_pairs(x + cols // 2 * k, first, end, HALVES, BF16)
            a, b, c, d, backs = a + a_, b + b_, c + c_, d + d_, backs + (back,)
        updated = ()
        for r in tl.static_range(ROWS):
            start = (first_row + r).to(tl.int64) * halves + first
            words = tl.load(codes + start * 4 + word, mask=word_mask, other=0)
            scale = load_scale(
                scales, nested, offset, dynamic, (start + half) // PER_BLOCK, half_mask, NESTED
            )
            w0, w1, w2, w3 = four_words(words, HALVES)
            none = tl.zeros([HALVES], dtype=tl.int32)
            none_each = ()
            for _ in tl.static_range(M):
                none_each = none_each + (none,)
            sums = add_word(w0, a, none_each, M, FP4, WIDE)
            sums = add_word(w1, b, sums, M, FP4, WIDE)
            if CHAINS == 2:
                more = add_word(w3, d, add_word(w2, c, none_each, M, FP4, WIDE), M, FP4, WIDE)
                for k in tl.static_range(M):
                    part = sum_of_pair(sums[k]) + sum_of_pair(more[k])
                    updated = updated + (totals[r * M + k] + part * (scale * backs[k]),)
            else:
                sums = add_word(w2, c, sums, M, FP4, WIDE)
                sums = add_word(w3, d, sums, M, FP4, WIDE)
                for k in tl.static_range(M):
                    updated = updated + (totals[r * M + k] + sum_of_pair(sums[k]) * (scale * backs[k]),)
        totals = updated
    result = tl.sum(rows_together(totals, ROWS * M, HALVES), axis=0)
    index = tl.arange(0, ROWS * M)
    row = first_row + index // M
    if BIAS and SPLIT == 1:
        result += tl.load(bias + row).to(tl.float32)
    at = out + (tl.program_id(1).to(tl.int64) * M + index % M) * rows + row
    tl.store(at, result.to(out.dtype.element_ty))


@triton.jit
def plain_kernel(
    x,
    codes,
    scales,
    nested,
    offset,
    dynamic,
    codebook,
    bias,
    out,
    m,
    rows,
    cols,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    M: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """The same product in fp32 by table, without PTX, for any number of columns: x [m, cols], out [m, rows].

    M rows of x a program. Blocks may begin anywhere.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    x_row = tl.program_id(1).to(tl.int64)
    for first in range(0, cols, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = row_mask[:, None] & (column < cols)[None, :]
        place = row.to(tl.int64)[:, None] * cols + column[None, :]
        scale = load_scale(scales, nested, offset, dynamic, place // BLOCKSIZE, mask, NESTED)
        pair = tl.load(codes + place // 2, mask=mask, other=0).to(tl.int32)
        code = tl.where(place % 2 == 0, pair >> 4, pair & 15)
        value = tl.load(x + x_row * cols + column, mask=column < cols, other=0.0).to(tl.float32)
        acc += tl.load(codebook + code) * scale * value[None, :]
    result = tl.sum(acc, axis=1)
    if BIAS:
        result += tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)
    tl.store(out + x_row * rows + row, result.to(out.dtype.element_ty), mask=row_mask)


@triton.jit
def fp16_rows_kernel(x, out, powers, cols, COLUMNS: tl.constexpr):
    """x [m, cols] -> out fp16 [m, cols] = x / power, powers fp32 [m]: 2**k that brings a row's largest to 2**3 .. 2**4.

    One program a row. With 64 products of codes at most 1 a block, sums of fp16 products are taken in fp32 anyway; the
    margin below 65,504 is for nothing, the one above 2**-24 for values 2**27 times smaller than the largest.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    largest = tl.zeros([COLUMNS], dtype=tl.float32)
    for first in range(0, cols, COLUMNS):
        value = tl.load(x + row * cols + first + column, mask=first + column < cols, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    exponent = (tl.max(largest, axis=0).to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 5), 254)
    factor = ((257 - exponent) << 23).to(tl.float32, bitcast=True)
    for first in range(0, cols, COLUMNS):
        mask = first + column < cols
        value = tl.load(x + row * cols + first + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row * cols + first + column, (value * factor).to(tl.float16), mask=mask)
    tl.store(powers + row, ((exponent - 3) << 23).to(tl.float32, bitcast=True))


@triton.jit
def mma_kernel(
    x,
    powers,
    codes,
    scales,
    nested,
    offset,
    dynamic,
    codebook,
    bias,
    out,
    m,
    rows,
    cols,
    split_steps,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    FP4: tl.constexpr,
    WIDE: tl.constexpr,
    PTX: tl.constexpr,
):
    """x fp16 [m, cols], to be multiplied by powers fp32 [m]; out [m, rows], or fp32 [SPLIT, m, rows] if SPLIT > 1.

    A program takes ROWS rows of the matrix, M rows of x and BLOCKS runs of 64 columns a step, of the
    ``split_steps`` steps that are its share. cols is a multiple of 64 * BLOCKS.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    x_row = tl.program_id(2) * M + tl.arange(0, M)
    x_mask = x_row < m
    steps = cols // (64 * BLOCKS)
    begin = tl.program_id(1) * split_steps
    end = tl.minimum(begin + split_steps, steps)
    byte = tl.arange(0, 32)
    # of each 8 weights a word holds, the first four and the last four are multiplied apart
    column = (byte // 4) * 8 + byte % 4
    code_at = codes + row.to(tl.int64)[:, None] * (cols // 2) + byte[None, :]
    x_at = x + x_row[None, :] * cols + column[:, None]
    block_at = row.to(tl.int64) * (cols // 64)
    acc = tl.zeros([ROWS, M], dtype=tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        for b in tl.static_range(BLOCKS):
            block = step * BLOCKS + b
            packed = tl.load(code_at + block * 32, mask=row_mask[:, None], other=0)
            first = tl.load(x_at + block * 64, mask=x_mask[None, :], other=0.0)
            second = tl.load(x_at + block * 64 + 4, mask=x_mask[None, :], other=0.0)
            scale = load_scale(
                scales, nested, offset, dynamic, (block_at + block) // (BLOCKSIZE // 64), row_mask, NESTED
            )
            if PTX:
                part = tl.dot(bytes_to_quad(packed, False, FP4, WIDE), first)
                part = tl.dot(bytes_to_quad(packed, True, FP4, WIDE), second, part)
            else:
                # the same products, the two weights of a byte apart
                even = tl.load(codebook + (packed >> 4).to(tl.int32)).to(tl.float16)
                odd = tl.load(codebook + (packed & 15).to(tl.int32)).to(tl.float16)
                pair = x + x_row[None, :] * cols + block * 64 + 2 * byte[:, None]
                part = tl.dot(even, tl.load(pair, mask=x_mask[None, :], other=0.0))
                part = tl.dot(odd, tl.load(pair + 1, mask=x_mask[None, :], other=0.0), part)
            acc += part * scale[:, None]
    acc = acc * tl.load(powers + x_row, mask=x_mask, other=0.0)[None, :]
    if BIAS and SPLIT == 1:
        acc += tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    at = out + (tl.program_id(1).to(tl.int64) * m + x_row[None, :]) * rows + row[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=row_mask[:, None] & x_mask[None, :])


@triton.jit
def combine_kernel(partial, bias, out, n, rows, SPLIT: tl.constexpr, BIAS: tl.constexpr, TILE: tl.constexpr):
    """partial fp32 [SPLIT, n], n = m * rows -> out [n]: their sum in order, plus bias [rows]."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = place < n
    total = tl.load(partial + place, mask=mask, other=0.0)
    for i in tl.static_range(1, SPLIT):
        total += tl.load(partial + i * n + place, mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias + place % rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)
