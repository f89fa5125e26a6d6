"""The op ``tuckaway::linear_int8``: its schema, fake and gradient, and which code serves which shape."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from tuckaway_kernels.dequantize_int8.launch import launch_out
from tuckaway_kernels.gradients import bias_gradient
from tuckaway_kernels.library import define, differentiable
from tuckaway_kernels.linear_int8 import reference
from tuckaway_kernels.linear_int8.fused import llm_int8_product, weight_only_product
from tuckaway_kernels.pieces import check_product, product_by_pieces
from tuckaway_kernels.selection import choose_int8, fuses

choice_of = lru_cache(maxsize=4096)(choose_int8)


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


def launch(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float | None,
    transpose: bool,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply on the device of ``x``; see `reference.linear_int8`."""
    reference.check_linear_int8(codes, absmax, threshold, transpose, compute_dtype)
    rows, cols = codes.shape
    check_product(x, bias, *((cols, rows) if transpose else (rows, cols)))
    m = x.numel() // cols if transpose and cols else 0
    if m and rows and threshold is not None:
        out = torch.empty((m, rows), dtype=x.dtype, device=x.device)
        llm_int8_product(x.reshape(m, cols).contiguous(), codes, absmax, bias, threshold, out)
        return out.view(*x.shape[:-1], rows)
    if threshold is not None:
        return reference.linear_int8(x, codes, absmax, bias, threshold, transpose, compute_dtype)
    if m and rows and fuses(x.device):
        choice = choice_of(x.device, m, rows, cols, compute_dtype)
        if choice is not None:
            matrix = x.reshape(m, cols)
            if x.dtype != compute_dtype:
                matrix = matrix.to(compute_dtype)
            if bias is not None and bias.dtype != compute_dtype:
                bias = bias.to(compute_dtype)
            out = torch.empty((m, rows), dtype=compute_dtype, device=x.device)
            weight_only_product(matrix.contiguous(), codes, absmax, bias, out, choice)
            return (out if x.dtype == compute_dtype else out.to(x.dtype)).view(*x.shape[:-1], rows)
    decode = reference.decoder(codes, absmax, launch_out)
    return product_by_pieces(x, bias, rows, cols, transpose, compute_dtype, decode)


def _setup(ctx: Any, inputs: tuple[Any, ...]) -> None:
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
    triton=launch,
)
differentiable("linear_int8", _setup, _backward, reference=reference.linear_int8, triton=launch)
