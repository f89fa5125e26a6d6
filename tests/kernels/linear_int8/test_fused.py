"""The int8 kernels in Triton's interpreter, against products in float64 and LLM.int8() in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tuckaway_kernels  # noqa: F401
from tuckaway_kernels.linear_int8.reference import linear_int8
from tuckaway_kernels.selection import Choice

OPS = torch.ops.tuckaway
FUSED = "tuckaway_kernels.linear_int8.fused"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("choice", "m", "rows", "cols"),
    [
        (Choice("gemv", 4, 1, columns=512), 1, 9, 300),
        (Choice("gemv", 4, 1, columns=512, split=2), 2, 8, 1024),
        (Choice("mma", 32, 2, tile_m=16, columns=128, stages=2), 5, 40, 256),
        (Choice("mma", 32, 2, tile_m=16, columns=128, stages=2, split=2), 20, 40, 512),
    ],
)
def test_weight_only(
    interpret: Callable[..., Any], choice: Choice, m: int, rows: int, cols: int, bias: bool
) -> None:
    codes, absmax = OPS.quantize_int8(torch.randn(rows, cols))
    x, added = torch.randn(m, cols).half().float(), torch.randn(rows) if bias else None
    out = torch.full((m, rows), torch.nan)
    given = (x, codes, absmax, added, out) if bias else (x, codes, absmax, None, out)
    result = interpret(FUSED, "weight_only_product", *given, choice)[-1]
    exact = x.double() @ OPS.dequantize_int8(codes, absmax, torch.float32).double().t()
    exact = exact if added is None else exact + added.double()
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bias_dtype", [None, torch.float16, torch.float32])
@pytest.mark.parametrize("threshold", [0.0, 2.5, 0.5])
@pytest.mark.parametrize(("m", "rows", "cols"), [(1, 5, 7), (3, 40, 300), (17, 33, 1100)])
def test_llm_int8_equals_the_reference(
    interpret: Callable[..., Any],
    m: int,
    rows: int,
    cols: int,
    threshold: float,
    bias_dtype: torch.dtype | None,
    dtype: torch.dtype,
) -> None:
    codes, absmax = OPS.quantize_int8(torch.randn(rows, cols) * 0.1)
    x = torch.randn(m, cols).to(dtype)
    bias = None if bias_dtype is None else torch.randn(rows).to(bias_dtype)
    out = torch.full((m, rows), torch.nan, dtype=dtype)
    result = interpret(FUSED, "llm_int8_product", x, codes, absmax, bias, threshold, out)[-1]
    expected = linear_int8(x, codes, absmax, bias, threshold, True, dtype)
    # the sum over outlier columns is taken in another order; fp32 rounds once where the fused instruction would
    torch.testing.assert_close(result, expected, rtol=2e-3, atol=2e-3)
    if threshold == 0.0:
        assert (result == expected).float().mean() > 0.98


def test_llm_int8_with_nothing_but_outliers(interpret: Callable[..., Any]) -> None:
    codes, absmax = OPS.quantize_int8(torch.randn(16, 32))
    x = torch.full((2, 32), 7.0, dtype=torch.float16)
    out = torch.full((2, 16), torch.nan, dtype=torch.float16)
    result = interpret(FUSED, "llm_int8_product", x, codes, absmax, None, 6.0, out)[-1]
    exact = x.double() @ OPS.dequantize_int8(codes, absmax, torch.float16).double().t()
    torch.testing.assert_close(result.double(), exact, rtol=2e-3, atol=2e-3)
