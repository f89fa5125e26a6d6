"""LLM.int8() in few launches, the host asking nothing: which columns hold outliers is found and used on the device.

`find_outliers_kernel` marks the columns (few rows need no launch of its own for that); `quantize_activations_kernel`
quantizes the rows of x, and one program more makes a list of the marked columns; `integer_kernel` multiplies codes and
adds the product of the outlier columns by decoded weights, of which it reads those columns alone.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from tuckaway_kernels.arithmetic import reciprocal
from tuckaway_kernels.quantize_int8.kernel import encode, load_half


@triton.jit
def find_outliers_kernel(x, flags, threshold, m, cols, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Set flags int8 [cols] to 1 where a column of x [m, cols], rounded to fp16, reaches threshold fp32 [1].

    A program takes COLUMNS columns of ROWS rows. Several may write the same 1.
    """
    limit = tl.load(threshold)
    first = tl.program_id(1) * ROWS
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = x + first.to(tl.int64) * cols + column
    largest = tl.zeros([COLUMNS], dtype=tl.float32)
    for _ in range(first, tl.minimum(first + ROWS, m)):
        value = load_half(at, column < cols)
        largest = tl.maximum(largest, tl.where(value == value, tl.abs(value), 0.0))
        at += cols
    one = tl.full([COLUMNS], 1, dtype=tl.int8)
    tl.store(flags + column, one, mask=(column < cols) & (largest >= limit))


@triton.jit
def marked(x, flags, threshold, m, cols, column, COLUMNS: tl.constexpr, SCAN: tl.constexpr):
    """1 for each of these columns [COLUMNS] that holds an outlier, else 0: int32."""
    if SCAN:
        limit = tl.load(threshold)
        largest = tl.zeros([COLUMNS], dtype=tl.float32)
        for row in range(0, m):
            value = load_half(x + row * cols + column, column < cols)
            largest = tl.maximum(largest, tl.where(value == value, tl.abs(value), 0.0))
        flag = (largest >= limit).to(tl.int32)
    else:
        flag = tl.load(flags + column, mask=column < cols, other=0).to(tl.int32)
    return flag


@triton.jit
def quantize_activations_kernel(
    x,
    flags,
    threshold,
    codes,
    scales,
    outliers,
    table,
    m,
    cols,
    COLUMNS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    SCAN: tl.constexpr,
    PTX: tl.constexpr,
):
    """Quantize x [m, cols] -> codes int8 [m, cols], scales fp32 [m].

    With OUTLIERS also outliers int32 [1 + cols]: how many, then which columns.

    Entries that reach the threshold do not count in a row's scale; columns that hold one get the code 0. One program a
    row, and one that makes the list. SCAN: each looks through all rows for outliers itself and reads no flags.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    if row < m:
        largest = tl.zeros([COLUMNS], dtype=tl.float32)
        for left in range(0, cols, COLUMNS):
            value = tl.abs(load_half(x + row * cols + left + column, left + column < cols))
            if OUTLIERS:
                value = tl.where(value >= tl.load(threshold), 0.0, value)
            largest = tl.maximum(largest, tl.where(value == value, value, 0.0))
        scale = tl.max(largest, axis=0)
        rate = 127.0 * reciprocal(scale, table, PTX)
        for left in range(0, cols, COLUMNS):
            inside = left + column < cols
            value = load_half(x + row * cols + left + column, inside)
            if OUTLIERS:
                flag = marked(x, flags, threshold, m, cols, left + column, COLUMNS, SCAN)
                value = tl.where(flag != 0, 0.0, value)
            tl.store(codes + row * cols + left + column, encode(value, rate, PTX), mask=inside)
        tl.store(scales + row, scale)
    else:
        if OUTLIERS:
            count = 0
            for left in range(0, cols, COLUMNS):
                flag = marked(x, flags, threshold, m, cols, left + column, COLUMNS, SCAN)
                place = count + tl.cumsum(flag, axis=0)
                tl.store(outliers + place, left + column, mask=flag != 0)
                count += tl.sum(flag, axis=0)
            tl.store(outliers, count)


@triton.jit
def finish(
    total,
    x_scales,
    absmax,
    bias,
    x,
    outliers,
    codes,
    out,
    x_row,
    row,
    m,
    rows,
    cols,
    INVERSE_127_SQUARED: tl.constexpr,
    INVERSE_127: tl.constexpr,
    BIAS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Total int32 [M, ROWS] -> out: times both scales, plus bias, as fp16, plus the product of the outlier columns.

    BIAS: 0, none; 1, fp16, added before the rounding; 2, another, after it. COLUMNS outlier columns a step.
    """
    row_mask = row < rows
    x_mask = x_row < m
    weight_scale = tl.load(absmax + row, mask=row_mask, other=0.0)
    scaled = total.to(tl.float32) * tl.load(x_scales + x_row, mask=x_mask, other=0.0)[:, None]
    scaled = scaled * weight_scale[None, :]
    if BIAS == 1:
        added = tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)
        factors = tl.full([M, ROWS], INVERSE_127_SQUARED, dtype=tl.float32)
        result = tl.fma(scaled, factors, tl.broadcast_to(added[None, :], [M, ROWS]))
        result = result.to(tl.float16).to(tl.float32)
    else:
        result = (scaled * INVERSE_127_SQUARED).to(tl.float16).to(tl.float32)
        if BIAS == 2:
            added = tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)
            result = (result + added[None, :]).to(tl.float16).to(tl.float32)
    if OUTLIERS:
        dtype = out.dtype.element_ty
        result = result.to(dtype).to(tl.float32)
        count = tl.load(outliers)
        factor = (weight_scale * INVERSE_127)[None, :]
        acc = tl.zeros([M, ROWS], dtype=tl.float32)
        for first in range(0, count, COLUMNS):
            which = first + tl.arange(0, COLUMNS)
            there = which < count
            column = tl.load(outliers + 1 + which, mask=there, other=0)
            left = tl.load(
                x + x_row[:, None] * cols + column[None, :], mask=x_mask[:, None] & there[None, :], other=0.0
            )
            place = row.to(tl.int64)[None, :] * cols + column[:, None]
            code = tl.load(codes + place, mask=there[:, None] & row_mask[None, :], other=0)
            right = (code.to(tl.float32) * factor).to(dtype)
            acc = tl.dot(left, right, acc, input_precision="ieee")
        result += acc
    at = x_row[:, None] * rows + row[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=x_mask[:, None] & row_mask[None, :])


@triton.jit
def integer_kernel(
    quantized,
    codes,
    x_scales,
    absmax,
    bias,
    x,
    outliers,
    out,
    m,
    rows,
    cols,
    INVERSE_127_SQUARED: tl.constexpr,
    INVERSE_127: tl.constexpr,
    BIAS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Quantized int8 [m, cols] by codes int8 [rows, cols], transposed; exact, then `finish`: out [m, rows].

    EVEN: cols is a multiple of COLUMNS. Programs are ordered so that GROUP tiles of x share what they read of codes.
    """
    m_tiles = (m + M - 1) // M
    tiles = (rows + ROWS - 1) // ROWS
    program = tl.program_id(0)
    group = program // (GROUP * tiles)
    height = tl.minimum(m_tiles - group * GROUP, GROUP)
    x_row = (group * GROUP + program % (GROUP * tiles) % height) * M + tl.arange(0, M)
    row = program % (GROUP * tiles) // height * ROWS + tl.arange(0, ROWS)
    x_mask = x_row < m
    row_mask = row < rows
    column = tl.arange(0, COLUMNS)
    x_at = quantized + x_row.to(tl.int64)[:, None] * cols + column[None, :]
    code_at = codes + row.to(tl.int64)[:, None] * cols + column[None, :]
    acc = tl.zeros([M, ROWS], dtype=tl.int32)
    for first in tl.range(0, cols, COLUMNS, num_stages=STAGES):
        if EVEN:
            value = tl.load(x_at + first, mask=x_mask[:, None], other=0)
            code = tl.load(code_at + first, mask=row_mask[:, None], other=0)
        else:
            inside = (first + column < cols)[None, :]
            value = tl.load(x_at + first, mask=x_mask[:, None] & inside, other=0)
            code = tl.load(code_at + first, mask=row_mask[:, None] & inside, other=0)
        acc = tl.dot(value, code.T, acc, out_dtype=tl.int32)
    finish(
        acc,
        x_scales,
        absmax,
        bias,
        x,
        outliers,
        codes,
        out,
        x_row.to(tl.int64),
        row,
        m,
        rows,
        cols,
        INVERSE_127_SQUARED,
        INVERSE_127,
        BIAS,
        OUTLIERS,
        M,
        ROWS,
        16,
    )
