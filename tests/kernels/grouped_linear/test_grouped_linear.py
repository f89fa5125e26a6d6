"""Products of groups of rows: the reference against loops over decoded matrices, the kernel against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tuckaway_kernels  # noqa: F401

OPS = torch.ops.tuckaway
LAUNCH = "tuckaway_kernels.grouped_linear.launch"
ENDS = [[2, 2, 7], [0, 0, 9], [9, 9, 9], [3, 5, 9], [0, 0, 0], [1, 30, 30]]
SHAPES = [(16, 64), (5, 7), (33, 96)]


def four_bit(
    rows: int, cols: int, format: str, blocksize: int, nested: bool
) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor]:
    """Return the parts of a stack of three matrices, and the stack decoded."""
    stack = torch.randn(3, rows, cols, generator=torch.Generator().manual_seed(rows))
    codes, absmax = OPS.quantize_4bit(stack, format, blocksize)
    parts: tuple[torch.Tensor | None, ...] = (codes, absmax, None, None)
    if nested:
        parts = codes, *OPS.quantize_nested(absmax)
        absmax = OPS.dequantize_nested(*parts[1:])
    return parts, OPS.dequantize_4bit(codes, absmax, format, blocksize, stack.shape, torch.float32)


def by_loop(x: torch.Tensor, stack: torch.Tensor, ends: list[int], transpose: bool) -> torch.Tensor:
    out = torch.zeros(x.shape[0], stack.shape[1 if transpose else 2], dtype=torch.float64)
    begin = 0
    for matrix, end in zip(stack.double(), ends, strict=True):
        out[begin:end] = x[begin:end].double() @ (matrix.t() if transpose else matrix)
        begin = max(begin, end)
    return out


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_4bit_is_the_loop_over_matrices(
    ends: list[int], transpose: bool, nested: bool, rows: int, cols: int
) -> None:
    parts, stack = four_bit(rows, cols, "nf4", 64, nested)
    x = torch.randn(9, cols if transpose else rows)
    offs = torch.tensor(ends, dtype=torch.int32)
    result = OPS.grouped_linear_4bit(x, *parts, offs, "nf4", 64, rows, cols, transpose, torch.float32)
    torch.testing.assert_close(result, by_loop(x, stack, ends, transpose).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_int8_is_the_loop_over_matrices(ends: list[int], transpose: bool, rows: int, cols: int) -> None:
    codes, absmax = OPS.quantize_int8(torch.randn(3 * rows, cols))
    stack = OPS.dequantize_int8(codes, absmax, torch.float32).view(3, rows, cols)
    x = torch.randn(9, cols if transpose else rows)
    offs = torch.tensor(ends, dtype=torch.int32)
    result = OPS.grouped_linear_int8(x, codes.view(3, rows, cols), absmax, offs, transpose, torch.float32)
    torch.testing.assert_close(result, by_loop(x, stack, ends, transpose).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize(
    ("rows", "cols", "format", "nested"),
    [(16, 64, "nf4", False), (5, 7, "fp4", False), (70, 96, "nf4", True), (9, 128, "fp4", True)],
)
def test_the_kernels_give_the_same(
    interpret: Callable[..., Any],
    ends: list[int],
    transpose: bool,
    rows: int,
    cols: int,
    format: str,
    nested: bool,
) -> None:
    parts, _ = four_bit(rows, cols, format, 64, nested)
    x = torch.randn(9, cols if transpose else rows)
    offs = torch.tensor(ends, dtype=torch.int32)
    options = (offs, format, 64, rows, cols, transpose, torch.float32)
    result = interpret(LAUNCH, "launch_4bit", x, *parts, *options)
    torch.testing.assert_close(result, OPS.grouped_linear_4bit(x, *parts, *options), rtol=1e-5, atol=1e-4)
    codes, absmax = OPS.quantize_int8(torch.randn(3 * rows, cols))
    arguments = (x, codes.view(3, rows, cols), absmax, offs, transpose, torch.float32)
    result = interpret(LAUNCH, "launch_int8", *arguments)
    torch.testing.assert_close(result, OPS.grouped_linear_int8(*arguments), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("transpose", [True, False])
def test_gradient_and_schema(transpose: bool) -> None:
    parts, stack = four_bit(16, 64, "nf4", 64, False)
    offs = torch.tensor([4, 4, 8], dtype=torch.int32)
    x = torch.randn(9, 64 if transpose else 16, requires_grad=True)
    arguments = (x, *parts, offs, "nf4", 64, 16, 64, transpose, torch.float32)
    result = OPS.grouped_linear_4bit(*arguments)
    grad = torch.randn_like(result)
    (dx,) = torch.autograd.grad(result, x, grad)
    expected = by_loop(grad, stack, [4, 4, 8], not transpose).float()
    torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-4)
    torch.library.opcheck(OPS.grouped_linear_4bit, arguments)
    codes, absmax = OPS.quantize_int8(stack.view(48, 64))
    arguments = (x, codes.view(3, 16, 64), absmax, offs, transpose, torch.float32)
    (dx,) = torch.autograd.grad(OPS.grouped_linear_int8(*arguments), x, grad)
    decoded = OPS.dequantize_int8(codes, absmax, torch.float32).view(3, 16, 64)
    expected = by_loop(grad, decoded, [4, 4, 8], not transpose).float()
    torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-4)
    torch.library.opcheck(OPS.grouped_linear_int8, arguments)


def test_refuses_what_does_not_go_together() -> None:
    parts, _ = four_bit(16, 64, "nf4", 64, False)
    offs = torch.tensor([1, 2, 3], dtype=torch.int32)
    options = ("nf4", 64, 16, 64, True, torch.float32)
    with pytest.raises(ValueError, match=r"x must be \[T, 64\]"):
        OPS.grouped_linear_4bit(torch.zeros(3, 63), *parts, offs, *options)
    with pytest.raises(ValueError, match="offs must be int32"):
        OPS.grouped_linear_4bit(torch.zeros(3, 64), *parts, offs.long(), *options)
    with pytest.raises(ValueError, match="codes must have"):
        OPS.grouped_linear_4bit(torch.zeros(3, 64), *parts, offs[:2], *options)
    codes, absmax = OPS.quantize_int8(torch.randn(48, 64))
    with pytest.raises(ValueError, match="one end for each of 3"):
        OPS.grouped_linear_int8(
            torch.zeros(3, 64), codes.view(3, 16, 64), absmax, offs[:2], True, torch.float32
        )
