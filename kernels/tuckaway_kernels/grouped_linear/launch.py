"""The ops ``tuckaway::grouped_linear_4bit`` and ``grouped_linear_int8``: schemas, fakes, gradients, launches.

``grouped_linear_4bit(x [T, K], codes, scales, ..., offs int32 [E], ...) -> [T, N]`` is ``grouped_mm`` with a stack of
4-bit matrices: see `reference`. The launch depends on shapes alone, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from tuckaway_kernels.codebooks import codebook, dynamic_map
from tuckaway_kernels.dequantize_int8.reference import INVERSE_127
from tuckaway_kernels.grouped_linear import reference
from tuckaway_kernels.launching import Launch
from tuckaway_kernels.library import define, differentiable
from tuckaway_kernels.linear_4bit.reference import check_linear_4bit


def _fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    offs: torch.Tensor,
    format: str,
    blocksize: int,
    rows: int,
    cols: int,
    transpose: bool,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    reference.check_groups(x, offs, cols if transpose else rows)
    all_rows = offs.shape[0] * rows
    check_linear_4bit(
        codes, scales, nested_absmax, nested_offset, format, blocksize, all_rows, cols, compute_dtype
    )
    return x.new_empty((x.shape[0], rows if transpose else cols))


def launch_4bit(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    offs: torch.Tensor,
    format: str,
    blocksize: int,
    rows: int,
    cols: int,
    transpose: bool,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply on the device of ``x``; see `reference.grouped_linear_4bit`."""
    reference.check_groups(x, offs, cols if transpose else rows)
    experts = offs.shape[0]
    check_linear_4bit(
        codes, scales, nested_absmax, nested_offset, format, blocksize, experts * rows, cols, compute_dtype
    )
    t, outer = x.shape[0], rows if transpose else cols
    out = torch.empty((t, outer), dtype=compute_dtype, device=x.device)
    if out.numel():
        nested = nested_absmax is not None
        _prepared(t, experts, rows, cols, blocksize, nested, transpose, False)(
            x.to(compute_dtype).contiguous(),
            offs.contiguous(),
            codes,
            scales,
            scales if nested_absmax is None else nested_absmax,
            scales if nested_offset is None else nested_offset,
            dynamic_map(x.device),
            codebook(format, x.device),
            out,
        )
    return out.to(x.dtype)


def launch_int8(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    offs: torch.Tensor,
    transpose: bool,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply on the device of ``x``; see `reference.grouped_linear_int8`."""
    reference.check_grouped_int8(x, codes, absmax, offs, transpose, compute_dtype)
    experts, rows, cols = codes.shape
    t, outer = x.shape[0], rows if transpose else cols
    out = torch.empty((t, outer), dtype=compute_dtype, device=x.device)
    if out.numel():
        table = dynamic_map(x.device)
        _prepared(t, experts, rows, cols, 64, False, transpose, True)(
            x.to(compute_dtype).contiguous(),
            offs.contiguous(),
            codes,
            absmax,
            absmax,
            absmax,
            table,
            table,
            out,
        )
    return out.to(x.dtype)


@lru_cache(maxsize=1024)
def _prepared(
    t: int, experts: int, rows: int, cols: int, blocksize: int, nested: bool, transpose: bool, int8: bool
) -> Launch:
    from tuckaway_kernels.grouped_linear.kernel import grouped_kernel

    outer = rows if transpose else cols
    # rows of a group: few where tokens are few, as in decoding; the tensor cores take 16 at least
    tile = 16 if t <= 16 * experts else 64
    constants = {
        "TILE": tile,
        "OUTER": 64,
        "INNER": 64,
        "EXPERTS": 1 << experts.bit_length(),
        "BLOCKSIZE": blocksize,
        "NESTED": nested,
        "TRANSPOSE": transpose,
        "INT8": int8,
        "EVEN": transpose and not int8 and cols % 64 == 0 and blocksize >= 64,
        "INVERSE_127": INVERSE_127,
    }
    # every group may end with a tile that is not full, and so may the rows after the last group; no more than one a row
    programs = min(t, -(-t // tile) + experts + 1)
    integers = t, experts, rows, cols
    return Launch(grouped_kernel, (programs, -(-outer // 64), 1), integers, constants, warps=4, stages=3)


def _setup_4bit(ctx: Any, inputs: tuple[Any, ...]) -> None:
    _, *tensors = inputs[:6]
    ctx.save_for_backward(*tensors)
    ctx.options = inputs[6:]


def _backward_4bit(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """``dx = dy @ S[e]`` for ``y = x @ S[e]^T`` and the other way round; the stack gets no gradient."""
    *options, transpose, compute_dtype = ctx.options
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.tuckaway.grouped_linear_4bit(
            grad.contiguous(), *ctx.saved_tensors, *options, not transpose, compute_dtype
        )
    return dx, *[None] * 11


def _setup_int8(ctx: Any, inputs: tuple[Any, ...]) -> None:
    _, codes, absmax, offs, ctx.transpose, ctx.compute_dtype = inputs
    ctx.save_for_backward(codes, absmax, offs)


def _backward_int8(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """As `_backward_4bit`."""
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.tuckaway.grouped_linear_int8(
            grad.contiguous(), *ctx.saved_tensors, not ctx.transpose, ctx.compute_dtype
        )
    return dx, *[None] * 5


def _fake_int8(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    offs: torch.Tensor,
    transpose: bool,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    reference.check_grouped_int8(x, codes, absmax, offs, transpose, compute_dtype)
    return x.new_empty((x.shape[0], codes.shape[1] if transpose else codes.shape[2]))


define(
    "grouped_linear_4bit(Tensor x, Tensor codes, Tensor scales, Tensor? nested_absmax, Tensor? nested_offset, "
    "Tensor offs, str format, int blocksize, int rows, int cols, bool transpose, ScalarType compute_dtype) -> Tensor",
    reference=reference.grouped_linear_4bit,
    fake=_fake,
    triton=launch_4bit,
)
define(
    "grouped_linear_int8(Tensor x, Tensor codes, Tensor absmax, Tensor offs, bool transpose, "
    "ScalarType compute_dtype) -> Tensor",
    reference=reference.grouped_linear_int8,
    fake=_fake_int8,
    triton=launch_int8,
)
differentiable(
    "grouped_linear_4bit",
    _setup_4bit,
    _backward_4bit,
    reference=reference.grouped_linear_4bit,
    triton=launch_4bit,
)
differentiable(
    "grouped_linear_int8",
    _setup_int8,
    _backward_int8,
    reference=reference.grouped_linear_int8,
    triton=launch_int8,
)
