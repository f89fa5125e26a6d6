"""The op ``tuckaway::linear_4bit``: its schema, fake and gradient, and which code serves which shape."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from tuckaway_kernels.dequantize_4bit.launch import launch_out
from tuckaway_kernels.gradients import bias_gradient
from tuckaway_kernels.library import define, differentiable
from tuckaway_kernels.linear_4bit import reference
from tuckaway_kernels.linear_4bit.fused import fused_product
from tuckaway_kernels.nested_scales.launch import launch_dequantize
from tuckaway_kernels.pieces import check_product
from tuckaway_kernels.selection import choose_4bit, fuses

choice_of = lru_cache(maxsize=4096)(choose_4bit)


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


def launch(
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
    """Multiply on the device of ``x``, fused or by decoded weights; see `reference.linear_4bit`."""
    reference.check_linear_4bit(
        codes, scales, nested_absmax, nested_offset, format, blocksize, rows, cols, compute_dtype
    )
    check_product(x, bias, *((cols, rows) if transpose else (rows, cols)))
    if transpose and rows and compute_dtype != torch.float32 and fuses(x.device):
        m = x.numel() // cols if cols else 0
        choice = choice_of(x.device, m, rows, cols, blocksize, nested_absmax is not None)
        if choice is not None:
            matrix = x.reshape(m, cols)
            if x.dtype != compute_dtype:
                matrix = matrix.to(compute_dtype)
            if bias is not None and bias.dtype != compute_dtype:
                bias = bias.to(compute_dtype)
            out = torch.empty((m, rows), dtype=compute_dtype, device=x.device)
            fused_product(
                matrix.contiguous(),
                codes,
                scales,
                nested_absmax,
                nested_offset,
                bias,
                out,
                format,
                blocksize,
                choice,
            )
            return (out if x.dtype == compute_dtype else out.to(x.dtype)).view(*x.shape[:-1], rows)
    absmax = scales
    if nested_absmax is not None and nested_offset is not None:
        absmax = launch_dequantize(scales, nested_absmax, nested_offset)
    return reference.decoded_product(
        x, codes, absmax, bias, format, blocksize, rows, cols, transpose, compute_dtype, launch_out
    )


def _setup(ctx: Any, inputs: tuple[Any, ...]) -> None:
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
    triton=launch,
)
differentiable("linear_4bit", _setup, _backward, reference=reference.linear_4bit, triton=launch)
