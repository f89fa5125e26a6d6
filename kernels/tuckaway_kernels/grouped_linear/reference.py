"""Multiply groups of rows by the matrices of a quantized stack in plain torch: the definition, and the CPU's path.

As ``torch.nn.functional.grouped_mm`` with a 2-D left and a 3-D right operand: the rows ``offs[e - 1]`` to
``offs[e] - 1`` of ``x`` are multiplied by matrix ``e``. Only matrices that have rows are read. Rows that belong to no
group give zeros. Weights are decoded as `linear_4bit` and `linear_int8` (without threshold) decode them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tuckaway_kernels.codebooks import check_dtype, check_storage
from tuckaway_kernels.linear_4bit.reference import check_linear_4bit
from tuckaway_kernels.linear_4bit.reference import decoder as decoder_4bit
from tuckaway_kernels.linear_int8.reference import decoder as decoder_int8
from tuckaway_kernels.pieces import Decode, alignment_rows, product_by_pieces


def grouped_linear_4bit(
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
    """Multiply each group of rows by its matrix of the stack S ``[E, rows, cols]``, or by its transpose.

    Args:
        x: ``[T, cols]`` if ``transpose``, else ``[T, rows]``; fp32, fp16 or bf16.
        codes: uint8 with ``(E * rows * cols + 1) // 2`` elements.
        scales: fp32 absmax, one a block; if nested, their uint8 codes.
        nested_absmax: fp32, one for 256 scales, if the scales are nested.
        nested_offset: fp32, one element, if the scales are nested.
        offs: int32 ``[E]`` on the device of ``x``: where each group ends, ascending.
        format: ``"nf4"`` or ``"fp4"``.
        blocksize: weights sharing one scale; blocks run over the flat stack.
        rows: of a stored matrix.
        cols: of a stored matrix.
        transpose: ``x @ S[e]^T``, for stacks stored ``[E, N, K]``; else ``x @ S[e]``, for ``[E, K, N]``.
        compute_dtype: fp32, fp16 or bf16.

    Returns:
        ``[T, rows]`` or ``[T, cols]`` in the dtype of ``x``.

    Raises:
        ValueError: unknown format, blocksize or dtype, or tensors whose shapes or dtypes do not go together.

    Example:
        >>> import torch, tuckaway_kernels
        >>> ops = torch.ops.tuckaway
        >>> codes, absmax = ops.quantize_4bit(torch.randn(2, 8, 64), "nf4", 64)
        >>> x, ends = torch.randn(5, 64), torch.tensor([3, 5], dtype=torch.int32)
        >>> y = ops.grouped_linear_4bit(x, codes, absmax, None, None, ends, "nf4", 64, 8, 64, True, torch.float32)
        >>> y.shape
        torch.Size([5, 8])
    """
    check_groups(x, offs, cols if transpose else rows)
    check_linear_4bit(
        codes,
        scales,
        nested_absmax,
        nested_offset,
        format,
        blocksize,
        offs.shape[0] * rows,
        cols,
        compute_dtype,
    )
    absmax = scales
    if nested_absmax is not None and nested_offset is not None:
        absmax = torch.ops.tuckaway.dequantize_nested(scales, nested_absmax, nested_offset)
    decode = decoder_4bit(codes, absmax, format, blocksize, cols, torch.ops.tuckaway.dequantize_4bit_out)
    unit = alignment_rows(cols, blocksize)
    return _product(x, offs, rows, cols, transpose, compute_dtype, decode, unit=unit, spare=blocksize)


def grouped_linear_int8(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    offs: torch.Tensor,
    transpose: bool,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply each group of rows by its matrix of a stack of int8 codes, or by its transpose.

    Args:
        x: ``[T, cols]`` if ``transpose``, else ``[T, rows]``; fp32, fp16 or bf16.
        codes: int8 ``[E, rows, cols]``.
        absmax: fp32 ``[E * rows]``.
        offs: int32 ``[E]`` on the device of ``x``: where each group ends, ascending.
        transpose: ``x @ S[e]^T``, for stacks stored ``[E, N, K]``; else ``x @ S[e]``, for ``[E, K, N]``.
        compute_dtype: fp32, fp16 or bf16.

    Returns:
        ``[T, rows]`` or ``[T, cols]`` in the dtype of ``x``.

    Raises:
        ValueError: unknown dtype, or tensors whose shapes or dtypes do not go together.

    Example:
        >>> import torch, tuckaway_kernels
        >>> ops = torch.ops.tuckaway
        >>> codes, absmax = ops.quantize_int8(torch.randn(2 * 8, 64))
        >>> x, ends = torch.randn(5, 64), torch.tensor([0, 5], dtype=torch.int32)
        >>> ops.grouped_linear_int8(x, codes.view(2, 8, 64), absmax, ends, True, torch.float32).shape
        torch.Size([5, 8])
    """
    check_grouped_int8(x, codes, absmax, offs, transpose, compute_dtype)
    _, rows, cols = codes.shape
    decode = decoder_int8(codes.view(-1, cols), absmax, torch.ops.tuckaway.dequantize_int8_out)
    return _product(x, offs, rows, cols, transpose, compute_dtype, decode)


def _product(
    x: torch.Tensor,
    offs: torch.Tensor,
    rows: int,
    cols: int,
    transpose: bool,
    compute_dtype: torch.dtype,
    decode: Decode,
    *,
    unit: int = 1,
    spare: int = 0,
) -> torch.Tensor:
    out = torch.zeros((x.shape[0], rows if transpose else cols), dtype=x.dtype, device=x.device)
    begin = 0
    for expert, end in enumerate(min(int(end), x.shape[0]) for end in offs.tolist()):
        if begin < end:
            product_by_pieces(
                x[begin:end],
                None,
                rows,
                cols,
                transpose,
                compute_dtype,
                _shifted(decode, expert * rows),
                unit=unit,
                spare=spare,
                out=out[begin:end],
            )
        begin = max(begin, end)
    return out


def _shifted(decode: Decode, by: int) -> Callable[[int, int, torch.Tensor], torch.Tensor]:
    return lambda first, last, buffer: decode(by + first, by + last, buffer)


def check_groups(x: torch.Tensor, offs: torch.Tensor, inner: int) -> None:
    """Raise ValueError unless ``x`` is [T, inner] and ``offs`` can be the ends of its groups."""
    if x.dim() != 2 or x.shape[1] != inner:
        raise ValueError(f"x must be [T, {inner}] for this stack, not {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating-point dtype, not {x.dtype}")
    if offs.dim() != 1 or offs.dtype != torch.int32:
        raise ValueError(f"offs must be int32 [E], not {offs.dtype} {list(offs.shape)}")


def check_grouped_int8(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    offs: torch.Tensor,
    transpose: bool,
    dtype: torch.dtype,
) -> None:
    """Raise ValueError unless these describe a stack of int8 codes and a product with it."""
    if codes.dim() != 3:
        raise ValueError(f"codes must be [E, rows, cols], not {list(codes.shape)}")
    experts, rows, cols = codes.shape
    check_groups(x, offs, cols if transpose else rows)
    if offs.shape[0] != experts:
        raise ValueError(f"offs must have one end for each of {experts} matrices, not {offs.shape[0]}")
    check_dtype(dtype)
    check_storage("codes", codes, torch.int8, codes.numel())
    check_storage("absmax", absmax, torch.float32, experts * rows)
