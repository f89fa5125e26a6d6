"""Multiply by int8 rows: decode in registers, scale each row's sum once.

``gemv_kernel`` (few rows of x): a byte becomes fp32 by a byte permute into the mantissa of 2**23 and a subtraction, two
instructions where a conversion takes one of a quarter of the rate. ``mma_kernel``: int8 is exact in bf16 and fp16, so
tensor cores take the codes themselves.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(codes, PTX: tl.constexpr):
    """Int8 -> fp32, exactly."""
    if PTX:
        # $4 ^ 0x80808080 makes the bytes code + 128; 0x4b0000xx is 2**23 + xx
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 w; xor.b32 w, $4, 0x80808080; "
            "prmt.b32 $0, w, 0x4b000000, 0x7650; prmt.b32 $1, w, 0x4b000000, 0x7651; "
            "prmt.b32 $2, w, 0x4b000000, 0x7652; prmt.b32 $3, w, 0x4b000000, 0x7653; "
            "sub.f32 $0, $0, 0f4B000080; sub.f32 $1, $1, 0f4B000080; "
            "sub.f32 $2, $2, 0f4B000080; sub.f32 $3, $3, 0f4B000080; }",
            "=&f,=&f,=&f,=&f,r",
            [codes],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        result = codes.to(tl.float32)
    return result


@triton.jit
def gemv_kernel(
    x,
    codes,
    absmax,
    bias,
    out,
    rows,
    cols,
    split_cols,
    INVERSE_127: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    PTX: tl.constexpr,
):
    """x [m, cols], out [m, rows], or fp32 [SPLIT, m, rows] if SPLIT > 1; one row of x a program (axis 2)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    column = tl.arange(0, COLUMNS)
    begin = tl.program_id(1) * split_cols
    end = tl.minimum(begin + split_cols, cols)
    x_row = tl.program_id(2).to(tl.int64)
    start = row.to(tl.int64)[:, None] * cols + column[None, :]
    acc = tl.zeros([ROWS, COLUMNS // 16], dtype=tl.float32)
    for first in range(begin, end, COLUMNS):
        inside = first + column < end
        code = tl.load(codes + start + first, mask=row_mask[:, None] & inside[None, :], other=0)
        value = tl.load(x + x_row * cols + first + column, mask=inside, other=0.0).to(tl.float32)
        product = widen(code, PTX) * value[None, :]
        acc += tl.sum(tl.reshape(product, [ROWS, COLUMNS // 16, 16]), axis=2)
    result = tl.sum(acc, axis=1)
    result = result * (tl.load(absmax + row, mask=row_mask, other=0.0) * INVERSE_127)
    if BIAS and SPLIT == 1:
        result += tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)
    at = out + (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + x_row) * rows + row
    tl.store(at, result.to(out.dtype.element_ty), mask=row_mask)


@triton.jit
def mma_kernel(
    x,
    codes,
    absmax,
    bias,
    out,
    m,
    rows,
    cols,
    split_steps,
    INVERSE_127: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x fp16 or bf16 [m, cols]; out [m, rows], or fp32 [SPLIT, m, rows] if SPLIT > 1. cols is a multiple of COLUMNS."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    x_row = tl.program_id(2) * M + tl.arange(0, M)
    x_mask = x_row < m
    begin = tl.program_id(1) * split_steps
    end = tl.minimum(begin + split_steps, cols // COLUMNS)
    column = tl.arange(0, COLUMNS)
    code_at = codes + row.to(tl.int64)[:, None] * cols + column[None, :]
    x_at = x + x_row[None, :].to(tl.int64) * cols + column[:, None]
    acc = tl.zeros([ROWS, M], dtype=tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        code = tl.load(code_at + step * COLUMNS, mask=row_mask[:, None], other=0)
        value = tl.load(x_at + step * COLUMNS, mask=x_mask[None, :], other=0.0)
        acc = tl.dot(code.to(value.dtype), value, acc)
    acc = acc * (tl.load(absmax + row, mask=row_mask, other=0.0) * INVERSE_127)[:, None]
    if BIAS and SPLIT == 1:
        acc += tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    at = out + (tl.program_id(1).to(tl.int64) * m + x_row[None, :]) * rows + row[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=row_mask[:, None] & x_mask[None, :])
