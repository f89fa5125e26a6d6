"""The int8 products on a GPU: what is launched, in which order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final

import torch

from tuckaway_kernels.dequantize_int8.reference import INVERSE_127
from tuckaway_kernels.launching import Launch, has_ptx, kernel_reciprocal_table
from tuckaway_kernels.linear_4bit.fused import combine_launch
from tuckaway_kernels.linear_int8.reference import INVERSE_127_SQUARED
from tuckaway_kernels.plans import OUT, SETTLED, Plan, Room, X
from tuckaway_kernels.selection import Choice

MOST_SCANNED_ROWS: Final = 16
"""Rows of x that every program looks through for outliers itself, which saves two launches."""


def weight_only_product(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    choice: Choice,
) -> None:
    """Write ``x @ S^T + bias`` to ``out`` ``[m, rows]``, just allocated; ``x`` ``[m, cols]`` contiguous."""
    m, rows = out.shape
    plan = weight_only_plan(choice, m, rows, x.shape[1], bias is not None)
    plan.run(x, out, codes, absmax, absmax if bias is None else bias)


@lru_cache(maxsize=1024)
def weight_only_plan(choice: Choice, m: int, rows: int, cols: int, bias: bool) -> Plan:
    """Return the launches of a product by decoded weights; settled are codes, scales and bias (if any)."""
    from tuckaway_kernels.linear_int8.kernel import gemv_kernel, mma_kernel

    split = choice.split
    if choice.kernel == "gemv":
        constants = {
            "INVERSE_127": INVERSE_127,
            "ROWS": choice.tile_rows,
            "COLUMNS": choice.columns,
            "SPLIT": split,
            "BIAS": bias,
            "PTX": has_ptx(),
        }
        grid = -(-rows // choice.tile_rows), split, m
        integers = rows, cols, -(-cols // split)
        multiply = Launch(gemv_kernel, grid, integers, constants, warps=choice.warps, aligned=True)
    else:
        constants = {
            "INVERSE_127": INVERSE_127,
            "ROWS": choice.tile_rows,
            "M": choice.tile_m,
            "COLUMNS": choice.columns,
            "SPLIT": split,
            "BIAS": bias,
            "STAGES": choice.stages,
        }
        steps = -(-(cols // choice.columns) // split)
        grid = -(-rows // choice.tile_rows), split, -(-m // choice.tile_m)
        multiply = Launch(
            mma_kernel,
            grid,
            (m, rows, cols, steps),
            constants,
            warps=choice.warps,
            stages=choice.stages,
            aligned=True,
        )
    codes, absmax, added = range(SETTLED, SETTLED + 3)
    combine = combine_launch(split, m, rows, bias)
    if combine is None:
        return Plan(((multiply, (X, codes, absmax, added, OUT)),))
    parts = (multiply, (X, codes, absmax, added, ~0)), (combine, (~0, added, OUT))
    return Plan(parts, (Room((split, m, rows), torch.float32),))


@dataclass(frozen=True)
class LlmTile:
    """What a program of LLM.int8()'s product takes, and with what.

    Args:
        m: rows of x.
        rows: of the matrix.
        columns: a step.
        warps: 32 threads each.
        stages: of the software pipeline.
    """

    m: int
    rows: int
    columns: int
    warps: int
    stages: int


@lru_cache(maxsize=1024)
def llm_tile(m: int) -> LlmTile:
    """Return the tile for a product of ``m`` rows."""
    # us on an H100 for 4096x4096, outliers in 11 columns; in brackets the next best
    if m <= 16:
        return LlmTile(16, 16, 512, 2, 4)  # 16 rows: 16.7 (17.3)
    if m <= 64:
        return LlmTile(64, 32, 256, 4, 3)  # 64 rows: 21.4 (22.0)
    if m <= 1024:
        return LlmTile(128, 64, 128, 4, 4)  # 512 rows: 38.3 (40.0)
    return LlmTile(128, 128, 128, 8, 4)  # 4,096 rows: 230 (247)


def llm_int8_product(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    out: torch.Tensor,
    tile: LlmTile | None = None,
) -> None:
    """Write LLM.int8()'s product to ``out`` ``[m, rows]``; ``x`` ``[m, cols]`` contiguous. Four launches at most."""
    m, cols = x.shape
    plan = llm_plan(m, codes.shape[0], cols, threshold, bias, tile)
    plan.run(x, out, *llm_settled(codes, absmax, bias, threshold))


def llm_plan(
    m: int, rows: int, cols: int, threshold: float, bias: torch.Tensor | None, tile: LlmTile | None = None
) -> Plan:
    """Return the launches of LLM.int8()'s product; settled are what `llm_settled` gives."""
    kind = 0 if bias is None else 1 if bias.dtype == torch.float16 else 2
    return _llm_plan(m, rows, cols, threshold > 0.0, kind, tile or llm_tile(m))


def llm_settled(
    codes: torch.Tensor, absmax: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> tuple[torch.Tensor, ...]:
    """Return codes, scales, bias (if any), the threshold and the table of reciprocals."""
    device = codes.device
    return (
        codes,
        absmax,
        absmax if bias is None else bias,
        _threshold(threshold, device),
        kernel_reciprocal_table(device),
    )


@cache
def _threshold(threshold: float, device: torch.device) -> torch.Tensor:
    return torch.tensor([threshold], dtype=torch.float32, device=device)


@lru_cache(maxsize=1024)
def _llm_plan(m: int, rows: int, cols: int, outliers: bool, bias: int, tile: LlmTile) -> Plan:
    from tuckaway_kernels.linear_int8.llm_kernel import (
        find_outliers_kernel,
        integer_kernel,
        quantize_activations_kernel,
    )

    codes, absmax, added, limit, table = range(SETTLED, SETTLED + 5)
    rooms = [Room((m, cols), torch.int8), Room((m,), torch.float32)]
    quantized, scales = flags, listed = ~0, ~1
    if outliers:
        rooms.append(Room((1 + cols,), torch.int32))
        listed = ~2
    steps: list[tuple[Launch, tuple[int, ...]]] = []
    scan = outliers and m <= MOST_SCANNED_ROWS
    if outliers and not scan:
        grid = -(-cols // 256), -(-m // 64), 1
        find = Launch(find_outliers_kernel, grid, (m, cols), {"ROWS": 64, "COLUMNS": 256}, warps=4)
        rooms.append(Room((cols,), torch.int8, zeros=True))
        flags = ~3
        steps.append((find, (X, flags, limit)))
    width = min(1 << (cols - 1).bit_length(), 4096)
    quantize = Launch(
        quantize_activations_kernel,
        (m + outliers, 1, 1),
        (m, cols),
        {"COLUMNS": width, "OUTLIERS": outliers, "SCAN": scan, "PTX": has_ptx()},
        warps=8 if width == 4096 else 4,
    )
    multiply = Launch(
        integer_kernel,
        (-(-rows // tile.rows) * -(-m // tile.m), 1, 1),
        (m, rows, cols),
        {
            "INVERSE_127_SQUARED": INVERSE_127_SQUARED,
            "INVERSE_127": INVERSE_127,
            "BIAS": bias,
            "OUTLIERS": outliers,
            "M": tile.m,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "EVEN": cols % tile.columns == 0,
            "STAGES": tile.stages,
            "GROUP": 8,
        },
        warps=tile.warps,
        stages=tile.stages,
    )
    steps += [
        (quantize, (X, flags, limit, quantized, scales, listed, table)),
        (multiply, (quantized, codes, scales, absmax, added, X, listed, OUT)),
    ]
    return Plan(tuple(steps), tuple(rooms))
