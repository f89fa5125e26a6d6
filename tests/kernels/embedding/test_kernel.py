"""The kernels in Triton's interpreter, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from golden import DTYPES
from tuckaway_kernels.embedding.reference import embedding_4bit, embedding_int8

LAUNCH = "tuckaway_kernels.embedding.launch"
EXACT = [torch.float32, torch.float16]  # the interpreter truncates when it stores bf16


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("rows", "cols", "blocksize"), [(1, 1, 64), (3, 5, 32), (31, 129, 64), (9, 1500, 4096)]
)
def test_4bit_equals_the_reference(
    interpret: Callable[..., Any],
    rows: int,
    cols: int,
    blocksize: int,
    format: str,
    nested: bool,
    dtype: torch.dtype,
) -> None:
    codes, absmax = torch.ops.tuckaway.quantize_4bit(torch.randn(rows, cols), format, blocksize)
    parts = torch.ops.tuckaway.quantize_nested(absmax) if nested else (absmax, None, None)
    index = torch.randint(rows, (2, 3))
    args = (index, codes, *parts, format, blocksize, rows, cols, dtype)
    assert torch.equal(interpret(LAUNCH, "launch_4bit", *args), embedding_4bit(*args))


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 5), (9, 1500)])
def test_int8_equals_the_reference(
    interpret: Callable[..., Any], rows: int, cols: int, dtype: torch.dtype
) -> None:
    args = (torch.randint(rows, (5,)), *torch.ops.tuckaway.quantize_int8(torch.randn(rows, cols)), dtype)
    assert torch.equal(interpret(LAUNCH, "launch_int8", *args), embedding_int8(*args))


def test_nothing_is_launched_for_no_rows(interpret: Callable[..., Any]) -> None:
    empty = torch.zeros(0, dtype=torch.long)
    codes, absmax = torch.ops.tuckaway.quantize_int8(torch.randn(4, 6))
    assert interpret(LAUNCH, "launch_int8", empty, codes, absmax, DTYPES["float32"]).shape == (0, 6)
