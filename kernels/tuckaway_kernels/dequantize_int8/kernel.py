"""Decode int8 rows: one read of the codes, one write of the weights."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dequantize_int8_kernel(
    codes,
    absmax,
    out,
    rows,
    columns,
    across,
    INVERSE_127: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Decode codes int8 [rows, columns], absmax fp32 [rows] -> out [rows, columns] fp32, fp16 or bf16.

    A program takes a tile of ROWS x COLUMNS; ``across`` tiles lie side by side.
    """
    tile = tl.program_id(0)
    row = (tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    scale = tl.load(absmax + row, mask=row < rows, other=0.0) * INVERSE_127
    weights = tl.load(codes + place, mask=inside, other=0).to(tl.float32) * scale[:, None]
    tl.store(out + place, weights.to(out.dtype.element_ty), mask=inside)
