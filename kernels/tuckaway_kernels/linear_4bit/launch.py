"""The op ``tuckaway::linear_4bit``: its schema, fake and gradient, and which code serves which shape."""

from __future__ import annotations

from typing import Any

import torch

from tuckaway_kernels.gradients import bias_gradient
from tuckaway_kernels.library import LIBRARY, define
from tuckaway_kernels.linear_4bit import reference
from tuckaway_kernels.pieces import check_product


def _fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    blocksize: int,
    rows: int,
    cols: int,
    transpose: bool,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    reference.check_linear_4bit(
        codes, scales, nested_absmax, nested_offset, format, blocksize, rows, cols, compute_dtype
    )
    inner, outer = (cols, rows) if transpose else (rows, cols)
    check_product(x, bias, inner, outer)
    return x.new_empty((*x.shape[:-1], outer))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, codes, scales, nested_absmax, nested_offset, bias, *ctx.options = inputs
    ctx.save_for_backward(codes, scales, nested_absmax, nested_offset)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """``dx = dy @ S`` for ``y = x @ S^T`` and the other way round; the weight gets no gradient."""
    format, blocksize, rows, cols, transpose, compute_dtype = ctx.options
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.tuckaway.linear_4bit(
            grad.contiguous(),
            *ctx.saved_tensors,
            None,
            format,
            blocksize,
            rows,
            cols,
            not transpose,
            compute_dtype,
        )
    db = bias_gradient(grad, ctx.bias_dtype) if ctx.needs_input_grad[5] else None
    return dx, None, None, None, None, db, None, None, None, None, None, None


define(
    "linear_4bit(Tensor x, Tensor codes, Tensor scales, Tensor? nested_absmax, Tensor? nested_offset, Tensor? bias, "
    "str format, int blocksize, int rows, int cols, bool transpose, ScalarType compute_dtype) -> Tensor",
    reference=reference.linear_4bit,
    fake=_fake,
)
torch.library.register_autograd("tuckaway::linear_4bit", _backward, setup_context=_setup, lib=LIBRARY)
