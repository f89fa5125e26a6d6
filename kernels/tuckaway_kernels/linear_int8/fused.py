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
from tuckaway_kernels.selection import Choice

LEAST_INT_MM_ROWS: Final = 17
"""torch._int_mm takes no fewer rows of x; and for 16 rows tensor cores would wait for the weights anyway."""


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
    multiply, combine = _weight_only_plan(choice, m, rows, x.shape[1], bias is not None)
    added = absmax if bias is None else bias
    if combine is None:
        multiply(x, codes, absmax, added, out)
        return
    partial = torch.empty((choice.split, m, rows), dtype=torch.float32, device=x.device)
    multiply(x, codes, absmax, added, partial)
    combine(partial, added, out)


@lru_cache(maxsize=1024)
def _weight_only_plan(
    choice: Choice, m: int, rows: int, cols: int, bias: bool
) -> tuple[Launch, Launch | None]:
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
    return multiply, combine_launch(split, m, rows, bias)


@dataclass(frozen=True)
class _LlmPlan:
    find: Launch | None
    quantize: Launch
    multiply: Launch | None  # None: torch does it
    split: int
    rescale: Launch


def llm_int8_product(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    out: torch.Tensor,
) -> None:
    """Write LLM.int8()'s product to ``out`` ``[m, rows]``; ``x`` ``[m, cols]`` contiguous. Five launches at most."""
    m, cols = x.shape
    rows = codes.shape[0]
    device = x.device
    whole = (
        device.type == "cuda"
        and torch.version.cuda is not None
        and m >= LEAST_INT_MM_ROWS
        and rows % 8 == cols % 8 == 0
        and codes.data_ptr() % 16 == 0
    )
    kind = 0 if bias is None else 1 if bias.dtype == torch.float16 else 2
    plan = _llm_plan(m, rows, cols, threshold > 0.0, kind, whole, out.dtype == torch.float32)
    quantized = torch.empty((m, cols), dtype=torch.int8, device=device)
    scales = torch.empty(m, dtype=torch.float32, device=device)
    flags, outliers = quantized, scales
    limit = _threshold(threshold, device)
    if plan.find is not None:
        flags = torch.zeros(cols, dtype=torch.int8, device=device)
        outliers = torch.empty(1 + cols, dtype=torch.int32, device=device)
        plan.find(x, flags, limit)
    plan.quantize(x, flags, limit, quantized, scales, outliers, kernel_reciprocal_table(device))
    if plan.multiply is None:
        product = torch._int_mm(quantized, codes.t())
    else:
        product = torch.empty((plan.split, m, rows), dtype=torch.int32, device=device)
        plan.multiply(quantized, codes, product)
    plan.rescale(product, scales, absmax, absmax if bias is None else bias, x, outliers, codes, out)


@cache
def _threshold(threshold: float, device: torch.device) -> torch.Tensor:
    return torch.tensor([threshold], dtype=torch.float32, device=device)


@lru_cache(maxsize=1024)
def _llm_plan(m: int, rows: int, cols: int, outliers: bool, bias: int, whole: bool, fp32: bool) -> _LlmPlan:
    from tuckaway_kernels.linear_int8.llm_kernel import (
        find_outliers_kernel,
        integer_kernel,
        quantize_activations_kernel,
        rescale_kernel,
    )

    find = None
    if outliers:
        grid = -(-cols // 256), -(-m // 64), 1
        find = Launch(find_outliers_kernel, grid, (m, cols), {"ROWS": 64, "COLUMNS": 256}, warps=4)
    width = min(1 << (cols - 1).bit_length(), 4096)
    quantize = Launch(
        quantize_activations_kernel,
        (m + outliers, 1, 1),
        (m, cols),
        {"COLUMNS": width, "OUTLIERS": outliers, "PTX": has_ptx()},
        warps=8 if width == 4096 else 4,
    )
    multiply, split = None, 1
    if not whole:
        steps = -(-cols // 128)
        tile_m = 16 if m <= 16 else 64
        if m <= 64:
            split = 4 if steps >= 16 else 2 if steps >= 8 else 1
        multiply = Launch(
            integer_kernel,
            (-(-rows // 64), split, -(-m // tile_m)),
            (m, rows, cols, -(-steps // split)),
            {"ROWS": 64, "M": tile_m, "COLUMNS": 128, "STAGES": 3},
            warps=2,
            stages=3,
        )
    tile_m = 16 if m <= 16 else 64
    tile_rows = 32 if m <= 16 else 64
    rescale = Launch(
        rescale_kernel,
        (-(-rows // tile_rows), -(-m // tile_m), 1),
        (m, rows, cols),
        {
            "INVERSE_127_SQUARED": INVERSE_127_SQUARED,
            "INVERSE_127": INVERSE_127,
            "SPLIT": split,
            "BIAS": bias,
            "OUTLIERS": outliers,
            "M": tile_m,
            "ROWS": tile_rows,
            "COLUMNS": 16,
        },
        warps=2 if m <= 16 else 4,
        stages=1,
    )
    return _LlmPlan(find, quantize, multiply, split, rescale)
