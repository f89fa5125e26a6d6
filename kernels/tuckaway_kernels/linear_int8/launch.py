"""The op ``tuckaway::linear_int8``: its schema, fake and gradient, and which code serves which shape."""

from __future__ import annotations

from typing import Any

import torch

from tuckaway_kernels.gradients import bias_gradient
from tuckaway_kernels.library import LIBRARY, define
from tuckaway_kernels.linear_int8 import reference
from tuckaway_kernels.pieces import check_product


def _fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float | None,
    transpose: bool,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    reference.check_linear_int8(codes, absmax, threshold, transpose, compute_dtype)
    rows, cols = codes.shape
    inner, outer = (cols, rows) if transpose else (rows, cols)
    check_product(x, bias, inner, outer)
    return x.new_empty((*x.shape[:-1], outer))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, codes, absmax, bias, threshold, transpose, compute_dtype = inputs
    ctx.save_for_backward(codes, absmax)
    ctx.transpose = transpose
    ctx.bias_dtype = None if bias is None else bias.dtype
    # the gradient of LLM.int8() is that of the decoded weights, in the dtype of x
    ctx.compute_dtype = compute_dtype if threshold is None else x.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """``dx = dy @ S`` for ``y = x @ S^T`` and the other way round; the weight gets no gradient."""
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.tuckaway.linear_int8(
            grad.contiguous(), *ctx.saved_tensors, None, None, not ctx.transpose, ctx.compute_dtype
        )
    db = bias_gradient(grad, ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return dx, None, None, db, None, None, None


define(
    "linear_int8(Tensor x, Tensor codes, Tensor absmax, Tensor? bias, float? threshold, bool transpose, "
    "ScalarType compute_dtype) -> Tensor",
    reference=reference.linear_int8,
    fake=_fake,
)
torch.library.register_autograd("tuckaway::linear_int8", _backward, setup_context=_setup, lib=LIBRARY)
