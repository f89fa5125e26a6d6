"""Decode the rows asked for: each program takes part of one row, blocks may begin anywhere in it."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from tuckaway_kernels.arithmetic import multiply


@triton.jit
def embedding_4bit_kernel(
    index,
    codes,
    scales,
    nested,
    offset,
    dynamic,
    codebook,
    out,
    rows,
    cols,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Index int64 [n] -> out [n, cols]; a row that is not there is filled with NaN.

    codes uint8, scales fp32 or (NESTED) uint8 with nested fp32 and offset fp32; dynamic fp32 [256], codebook fp32 [16].
    """
    which = tl.program_id(0).to(tl.int64)
    row = tl.load(index + which)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < cols
    rows_asked = tl.zeros([COLUMNS], tl.int64) + row
    there = inside & (rows_asked >= 0) & (rows_asked < rows)
    place = rows_asked * cols + column
    pair = tl.load(codes + (place >> 1), mask=there, other=0).to(tl.int32)
    code = tl.where((place & 1) == 0, pair >> 4, pair & 15)
    block = place // BLOCKSIZE
    if NESTED:
        entry = tl.load(scales + block, mask=there, other=0).to(tl.int32)
        inner = tl.load(nested + block // 256, mask=there, other=0.0)
        scale = multiply(tl.load(dynamic + entry), inner, PTX) + tl.load(offset)
    else:
        scale = tl.load(scales + block, mask=there, other=0.0)
    weights = multiply(tl.load(codebook + code), scale, PTX)
    weights = tl.where(there, weights, float("nan"))
    tl.store(out + which * cols + column, weights.to(out.dtype.element_ty), mask=inside)


@triton.jit
def embedding_int8_kernel(index, codes, absmax, out, rows, cols, COLUMNS: tl.constexpr):
    """Index int64 [n], codes int8 [rows, cols], absmax fp32 [rows] -> out [n, cols]; NaN where there is no such row."""
    which = tl.program_id(0).to(tl.int64)
    row = tl.load(index + which)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < cols
    rows_asked = tl.zeros([COLUMNS], tl.int64) + row
    there = inside & (rows_asked >= 0) & (rows_asked < rows)
    scale = tl.load(absmax + rows_asked, mask=there, other=0.0) * 7.874015718698502e-3
    code = tl.load(codes + row * cols + column, mask=there, other=0).to(tl.float32)
    weights = tl.where(there, code * scale, float("nan"))
    tl.store(out + which * cols + column, weights.to(out.dtype.element_ty), mask=inside)
