"""Quantize rows to int8: one read of the weights where a row fits in a program's registers, two where it does not."""

from __future__ import annotations

import triton
import triton.language as tl

from tuckaway_kernels.arithmetic import magnitude, multiply, reciprocal


@triton.jit
def load_half(pointer, mask):
    """Load weights and round them to fp16, as LLM.int8() does first; returns fp32."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float16).to(tl.float32)


@triton.jit
def encode(weights, rate, PTX: tl.constexpr):
    """Return int8 ``round_to_even(weights * rate)``, NaN giving 0.

    Adding 1.5 * 2**23 rounds to the nearest even and leaves the integer in the low byte.
    """
    y = multiply(weights, rate, PTX)
    rounded = (y + 12582912.0).to(tl.int32, bitcast=True)
    return tl.where(y == y, rounded, 0).to(tl.int8)


@triton.jit
def quantize_int8_kernel(
    w,
    codes,
    absmax,
    table,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LONG: tl.constexpr,
    PTX: tl.constexpr,
):
    """Quantize w [rows, columns] fp32, fp16 or bf16 -> codes int8 [rows, columns], absmax fp32 [rows].

    A program takes ROWS rows, COLUMNS columns at a time. LONG: a row is longer than that.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    start = row[:, None] * columns
    valid = (row < rows)[:, None]
    if LONG:
        largest = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for left in range(0, columns, COLUMNS):
            place = left + column[None, :]
            weights = load_half(w + start + place, valid & (place < columns))
            largest = tl.maximum(largest, magnitude(weights, PTX))
        scale = tl.max(largest, axis=1)
        rate = (127.0 * reciprocal(scale, table, PTX))[:, None]
        for left in range(0, columns, COLUMNS):
            place = left + column[None, :]
            inside = valid & (place < columns)
            weights = load_half(w + start + place, inside)
            tl.store(codes + start + place, encode(weights, rate, PTX), mask=inside)
    else:
        inside = valid & (column < columns)[None, :]
        weights = load_half(w + start + column[None, :], inside)
        scale = tl.max(magnitude(weights, PTX), axis=1)
        rate = (127.0 * reciprocal(scale, table, PTX))[:, None]
        tl.store(codes + start + column[None, :], encode(weights, rate, PTX), mask=inside)
    tl.store(absmax + row, scale, mask=row < rows)
