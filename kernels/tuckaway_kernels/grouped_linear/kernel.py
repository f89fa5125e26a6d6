"""Multiply groups of rows by matrices of a quantized stack, which group has which rows being known on the device alone.

The grid has as many programs as any division of the T rows into groups could need. A program finds its group and its
rows in it from the ends of the groups; one for which there are none left ends at once. So the launch depends on shapes
only, nothing waits for the device, and only matrices that have rows are read.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from tuckaway_kernels.linear_4bit.kernel import load_offset, load_scale


@triton.jit
def group_of_program(offs, t, experts, TILE: tl.constexpr, EXPERTS: tl.constexpr):
    """Group, first row and end of this program's rows. The rows after the last group are group ``experts``.

    A program that has no rows gets first = end.
    """
    which = tl.arange(0, EXPERTS)
    end = tl.minimum(tl.maximum(tl.load(offs + which, mask=which < experts, other=t), 0), t)
    before = tl.load(offs + which - 1, mask=(which > 0) & (which <= experts), other=0)
    begin = tl.where(which <= experts, tl.minimum(tl.maximum(before, 0), t), t)
    tiles = (tl.maximum(end - begin, 0) + TILE - 1) // TILE
    until = tl.cumsum(tiles, axis=0)
    program = tl.program_id(0)
    group = tl.sum((until <= program).to(tl.int32), axis=0)
    mine = which == group
    first = tl.sum(tl.where(mine, begin + (program - until + tiles) * TILE, 0), axis=0)
    last = tl.sum(tl.where(mine, end, 0), axis=0)
    return group, first, tl.maximum(tl.minimum(first + TILE, last), first)


@triton.jit
def load_4bit(
    codes,
    scales,
    nested,
    offset,
    dynamic,
    codebook,
    place,
    mask,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Decode the weights at ``place``, int64 indexes into the flat stack: fp32."""
    pair = tl.load(codes + place // 2, mask=mask, other=0).to(tl.int32)
    code = tl.where(place % 2 == 0, pair >> 4, pair & 15)
    scale = load_scale(scales, nested, offset, dynamic, place // BLOCKSIZE, mask, NESTED)
    return tl.load(codebook + code, mask=mask, other=0.0) * scale


@triton.jit
def load_block(
    codes,
    scales,
    nested,
    offset,
    dynamic,
    codebook,
    first,
    mask,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Decode INNER weights from each ``first``, int64 [OUTER], on, which share a scale: fp32 [INNER, OUTER]."""
    byte = tl.arange(0, INNER // 2)
    packed = tl.load(codes + (first // 2)[:, None] + byte[None, :], mask=mask[:, None], other=0).to(tl.int32)
    scale = load_scale(scales, nested, offset, dynamic, first // BLOCKSIZE, mask, NESTED)
    pairs = tl.join(tl.load(codebook + (packed >> 4)), tl.load(codebook + (packed & 15)))
    return (tl.reshape(pairs, [OUTER, INNER]) * scale[:, None]).T


@triton.jit
def grouped_kernel(
    x,
    offs,
    codes,
    scales,
    nested,
    offset,
    dynamic,
    codebook,
    out,
    t,
    experts,
    rows,
    cols,
    TILE: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    INT8: tl.constexpr,
    EVEN: tl.constexpr,
    INVERSE_127: tl.constexpr,
):
    """x [t, inner], out [t, outer]; stack [experts, rows, cols] of 4-bit codes, or (INT8) int8 with scales fp32 a row.

    A program takes TILE rows of one group and OUTER columns of the result, and INNER terms of the sums at a time. Any
    shape; EVEN: 4-bit, transposed, cols a multiple of INNER, and INNER codes of a row share a scale. Weights are cast
    to the dtype of x, products are added in fp32. EXPERTS: a power of two above ``experts``.
    """
    group, first, last = group_of_program(offs, t, experts, TILE, EXPERTS)
    offset = load_offset(offset, NESTED)
    if first < last:
        row = first + tl.arange(0, TILE)
        row_mask = row < last
        if TRANSPOSE:
            inner, outer = cols, rows
        else:
            inner, outer = rows, cols
        column = tl.program_id(1) * OUTER + tl.arange(0, OUTER)
        column_mask = column < outer
        acc = tl.zeros([TILE, OUTER], dtype=tl.float32)
        start = group.to(tl.int64) * rows * cols
        x_at = x + row.to(tl.int64)[:, None] * inner
        row_start = start + column.to(tl.int64) * cols
        if group < experts:
            for k in range(0, inner, INNER):
                term = k + tl.arange(0, INNER)
                term_mask = term < inner
                left = tl.load(x_at + term[None, :], mask=row_mask[:, None] & term_mask[None, :], other=0.0)
                if EVEN:
                    weight = load_block(
                        codes,
                        scales,
                        nested,
                        offset,
                        dynamic,
                        codebook,
                        row_start + k,
                        column_mask,
                        INNER,
                        OUTER,
                        BLOCKSIZE,
                        NESTED,
                    )
                else:
                    mask = term_mask[:, None] & column_mask[None, :]
                    if TRANSPOSE:
                        place = start + column.to(tl.int64)[None, :] * cols + term[:, None]
                    else:
                        place = start + term.to(tl.int64)[:, None] * cols + column[None, :]
                    if INT8:
                        weight = tl.load(codes + place, mask=mask, other=0).to(tl.float32)
                        if TRANSPOSE:
                            scale = tl.load(scales + group * rows + column, mask=column_mask, other=0.0)[
                                None, :
                            ]
                        else:
                            scale = tl.load(scales + group * rows + term, mask=term_mask, other=0.0)[:, None]
                        weight = weight * (scale * INVERSE_127)
                    else:
                        weight = load_4bit(
                            codes, scales, nested, offset, dynamic, codebook, place, mask, BLOCKSIZE, NESTED
                        )
                acc = tl.dot(left, weight.to(left.dtype), acc, input_precision="ieee")
        at = out + row.to(tl.int64)[:, None] * outer + column[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])
