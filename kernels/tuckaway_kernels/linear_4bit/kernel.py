"""Multiply one or two rows of ``x`` by a 4-bit matrix in bitsandbytes' own layout, decoding in registers.

``gemv_kernel`` uses no tensor cores: a thread takes 32 weights of a row (four words), looks up fp16 pairs (`table`) and
multiplies them by pairs of x with two fp16 multiply-adds an instruction. The fp16 sums are 16 terms long (error 4e-4 of
the result, below the 1.7e-3 of rounding the result to bf16), then scaled and added in fp32. x is brought to the range
of fp16 by a power of two of each 32 values' own, so that nothing overflows and nothing is lost.

Partial sums in fp32, where the columns are split among programs, are added in a fixed order by ``combine_kernel``.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from tuckaway_kernels.linear_4bit.decode import (
    bf16_pair_magnitude,
    fp16_pair_magnitude,
    scale_bf16_pair,
    scale_fp16_pair,
    sum_of_pair,
)
from tuckaway_kernels.linear_4bit.table import add_looked_up, fill_table
from tuckaway_kernels.overlap import after_launch_before, begin_next_launch


@triton.jit
def load_offset(offset, NESTED: tl.constexpr):
    """The offset of nested scales, fp32: to be read once, 8192x8192 takes 18 us instead of 20 for a row of x."""
    value = 0.0
    if NESTED:
        value = tl.load(offset)
    return value


@triton.jit
def load_scale(scales, nested, offset, dynamic, block, mask, NESTED: tl.constexpr):
    """Scales of these blocks, fp32; ``offset``: from `load_offset`."""
    if NESTED:
        code = tl.load(scales + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(dynamic + code) * tl.load(nested + block // 256, mask=mask, other=0.0) + offset
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
def load_rows(
    codes,
    scales,
    nested,
    start,
    mask,
    halves,
    ROWS: tl.constexpr,
    HALVES: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Load words [HALVES * 4] of ROWS rows, ``halves`` runs of 32 weights apart, and what `scales_of` takes.

    Nested scales are not looked up yet: that would wait for their codes.
    """
    word = tl.arange(0, HALVES * 4)
    half = tl.arange(0, HALVES)
    words = ()
    first = ()
    second = ()
    for r in tl.static_range(ROWS):
        at = start + r * halves
        words = words + (
            tl.load(codes + at * 4 + word, mask=word // 4 < mask, other=0, eviction_policy="evict_first"),
        )
        block = (at + half) // PER_BLOCK
        if NESTED:
            first = first + (tl.load(scales + block, mask=half < mask, other=0).to(tl.int32),)
            second = second + (tl.load(nested + block // 256, mask=half < mask, other=0.0),)
        else:
            scale = tl.load(scales + block, mask=half < mask, other=0.0)
            first = first + (scale,)
            second = second + (scale,)
    return words, first, second


@triton.jit
def scales_of(first, second, offset, dynamic, ROWS: tl.constexpr, NESTED: tl.constexpr):
    """Scales fp32 [HALVES] of ROWS rows from what `load_rows` gave."""
    scales = first
    if NESTED:
        scales = ()
        for r in tl.static_range(ROWS):
            scales = scales + (tl.load(dynamic + first[r]) * second[r] + offset,)
    return scales


@triton.jit
def all_x(x, first, halves, cols, M: tl.constexpr, HALVES: tl.constexpr, BF16: tl.constexpr):
    """What `x_pairs` gives, of M rows of x."""
    a, b, c, d, back = x_pairs(x, first, halves, HALVES, BF16)
    backs = (back,)
    for k in tl.static_range(1, M):
        a_, b_, c_, d_, back = x_pairs(x + cols // 2 * k, first, halves, HALVES, BF16)
        a, b, c, d, backs = a + a_, b + b_, c + c_, d + d_, backs + (back,)
    return a, b, c, d, backs


@triton.jit
def add_rows(
    words,
    factors,
    a,
    b,
    c,
    d,
    backs,
    lane,
    totals,
    ROWS: tl.constexpr,
    HALVES: tl.constexpr,
    M: tl.constexpr,
    CHAINS: tl.constexpr,
):
    """Add the products of ROWS rows by M rows of x to ``totals``, fp32 [HALVES] each."""
    none = tl.zeros([HALVES], dtype=tl.int32)
    none_each = ()
    for _ in tl.static_range(M):
        none_each = none_each + (none,)
    updated = ()
    for r in tl.static_range(ROWS):
        w0, w1, w2, w3 = four_words(words[r], HALVES)
        sums = add_looked_up(w1, lane, b, add_looked_up(w0, lane, a, none_each, M), M)
        if CHAINS == 2:
            more = add_looked_up(w3, lane, d, add_looked_up(w2, lane, c, none_each, M), M)
            for k in tl.static_range(M):
                part = sum_of_pair(sums[k]) + sum_of_pair(more[k])
                updated = updated + (totals[r * M + k] + part * (factors[r] * backs[k]),)
        else:
            sums = add_looked_up(w3, lane, d, add_looked_up(w2, lane, c, sums, M), M)
            for k in tl.static_range(M):
                updated = updated + (totals[r * M + k] + sum_of_pair(sums[k]) * (factors[r] * backs[k]),)
    return updated


@triton.jit
def store_rows(
    totals,
    bias,
    out,
    first_row,
    rows,
    ROWS: tl.constexpr,
    HALVES: tl.constexpr,
    M: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Add up ``totals`` over the threads and write ROWS results for each of M rows of x."""
    result = tl.sum(rows_together(totals, ROWS * M, HALVES), axis=0)
    index = tl.arange(0, ROWS * M)
    row = first_row + index // M
    if BIAS:
        result += tl.load(bias + row).to(tl.float32)
    at = out + (tl.program_id(1).to(tl.int64) * M + index % M) * rows + row
    tl.store(at, result.to(out.dtype.element_ty))


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
    ONCE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """x [M, cols] as int32 of two values; codes as int32 of eight; out [M, rows], fp32 [SPLIT, M, rows] if SPLIT > 1.

    A program takes ROWS rows at a time, and HALVES runs of 32 columns, of the ``split_halves`` that are its share: a
    thread takes one run, HALVES is 32 for each warp. ONCE: that is all its columns; x then stays in registers while
    the program goes through its rows, and the next rows are on their way while these are multiplied.
    CHAINS: 1, or 2 for fp16 sums half as long. cols is a multiple of 32; rows, of ROWS; M * ROWS is a power of two.
    """
    PER_BLOCK: tl.constexpr = BLOCKSIZE // 32
    halves = cols // 32
    begin = tl.program_id(1) * split_halves
    group = tl.program_id(0)
    if OVERLAP:
        # nothing is read before: every address depends on these
        settled = after_launch_before(group)
        offset += settled - group
        begin += settled - group
        group = settled
    offset = load_offset(offset, NESTED)
    end = tl.minimum(begin + split_halves, halves)
    run = group.to(tl.int64) * ROWS * halves + begin
    stride = tl.num_programs(0).to(tl.int64) * ROWS * halves
    zero = tl.zeros([HALVES], dtype=tl.float32)
    zeros = ()
    for _ in tl.static_range(M * ROWS):
        zeros = zeros + (zero,)
    if ONCE:
        words, first, second = load_rows(
            codes, scales, nested, run, end - begin, halves, ROWS, HALVES, PER_BLOCK, NESTED
        )
        a, b, c, d, backs = all_x(x, begin, end, cols, M, HALVES, BF16)
        lane = fill_table(HALVES, FP4)
        for now in tl.range(group, rows // ROWS, tl.num_programs(0), num_stages=1):
            factors = scales_of(first, second, offset, dynamic, ROWS, NESTED)
            following = now + tl.num_programs(0)
            left = tl.where(following < rows // ROWS, end - begin, 0)
            next_words, first, second = load_rows(
                codes, scales, nested, run + stride, left, halves, ROWS, HALVES, PER_BLOCK, NESTED
            )
            totals = add_rows(words, factors, a, b, c, d, backs, lane, zeros, ROWS, HALVES, M, CHAINS)
            store_rows(totals, bias, out, now * ROWS, rows, ROWS, HALVES, M, BIAS and SPLIT == 1)
            words = next_words
            run += stride
        if OVERLAP:
            # not sooner: programs of the next launch would crowd on the processors that are done first; 8192x8192 with
            # nested scales 20 us instead of 15
            group = begin_next_launch(group)
    else:
        lane = fill_table(HALVES, FP4)
        for now in tl.range(group, rows // ROWS, tl.num_programs(0), num_stages=1):
            totals = zeros
            for at in tl.range(begin, end, HALVES, num_stages=1):
                words, first, second = load_rows(
                    codes,
                    scales,
                    nested,
                    run + (at - begin),
                    end - at,
                    halves,
                    ROWS,
                    HALVES,
                    PER_BLOCK,
                    NESTED,
                )
                factors = scales_of(first, second, offset, dynamic, ROWS, NESTED)
                a, b, c, d, backs = all_x(x, at, end, cols, M, HALVES, BF16)
                totals = add_rows(words, factors, a, b, c, d, backs, lane, totals, ROWS, HALVES, M, CHAINS)
            store_rows(totals, bias, out, now * ROWS, rows, ROWS, HALVES, M, BIAS and SPLIT == 1)
            run += stride


@triton.jit
def combine_kernel(
    partial,
    bias,
    out,
    n,
    rows,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """partial fp32 [SPLIT, n], n = m * rows -> out [n]: their sum in order, plus bias [rows]."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if OVERLAP:
        place = begin_next_launch(after_launch_before(place))
    mask = place < n
    total = tl.load(partial + place, mask=mask, other=0.0)
    for i in tl.static_range(1, SPLIT):
        total += tl.load(partial + i * n + place, mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias + place % rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)
