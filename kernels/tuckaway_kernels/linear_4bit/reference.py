"""Multiply by a 4-bit matrix in plain torch: the definition of the op, and its path on the CPU.

Weights are decoded as `dequantize_4bit` does it, to ``compute_dtype``; ``x`` and bias are cast to it; the product
accumulates in fp32 and is rounded to ``compute_dtype``, then given in the dtype of ``x``. A piece of the matrix is
decoded at a time, into one buffer (`pieces`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tuckaway_kernels.codebooks import NESTED_BLOCKSIZE, check_4bit, check_storage
from tuckaway_kernels.pieces import Decode, alignment_rows, product_by_pieces


def linear_4bit(
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
    """Multiply by the stored matrix S ``[rows, cols]`` or by its transpose.

    Args:
        x: ``[..., cols]`` if ``transpose``, else ``[..., rows]``; fp32, fp16 or bf16.
        codes: uint8 with ``(rows * cols + 1) // 2`` elements.
        scales: fp32 absmax, one a block; if nested, their uint8 codes.
        nested_absmax: fp32, one for 256 scales, if the scales are nested.
        nested_offset: fp32, one element, if the scales are nested.
        bias: ``[rows]`` if ``transpose``, else ``[cols]``; or None.
        format: ``"nf4"`` or ``"fp4"``.
        blocksize: weights sharing one scale; blocks run over the flat matrix and may cross rows.
        rows: of S.
        cols: of S.
        transpose: ``x @ S^T`` as in ``F.linear``; else ``x @ S``.
        compute_dtype: fp32, fp16 or bf16.

    Returns:
        ``[..., rows]`` or ``[..., cols]`` in the dtype of ``x``.

    Raises:
        ValueError: unknown format, blocksize or dtype, or tensors whose shapes or dtypes do not go together.
    """
    check_linear_4bit(
        codes, scales, nested_absmax, nested_offset, format, blocksize, rows, cols, compute_dtype
    )
    absmax = scales
    if nested_absmax is not None and nested_offset is not None:
        absmax = torch.ops.tuckaway.dequantize_nested(scales, nested_absmax, nested_offset)
    return decoded_product(
        x,
        codes,
        absmax,
        bias,
        format,
        blocksize,
        rows,
        cols,
        transpose,
        compute_dtype,
        torch.ops.tuckaway.dequantize_4bit_out,
    )


def decoded_product(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    blocksize: int,
    rows: int,
    cols: int,
    transpose: bool,
    compute_dtype: torch.dtype,
    dequantize_out: Callable[[torch.Tensor, torch.Tensor, str, int, torch.Tensor], None],
) -> torch.Tensor:
    """Multiply by pieces of the matrix that ``dequantize_out`` decodes; see `linear_4bit`. ``absmax`` is fp32."""
    decode = decoder(codes, absmax, format, blocksize, cols, dequantize_out)
    unit = alignment_rows(cols, blocksize)
    return product_by_pieces(
        x, bias, rows, cols, transpose, compute_dtype, decode, unit=unit, spare=blocksize
    )


def decoder(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    format: str,
    blocksize: int,
    cols: int,
    dequantize_out: Callable[[torch.Tensor, torch.Tensor, str, int, torch.Tensor], None],
) -> Decode:
    """Return what decodes rows of the matrix for `pieces`, by ``dequantize_out``; its buffer has a block to spare."""
    flat_codes, flat_absmax = codes.view(-1), absmax.view(-1)

    def decode(first: int, last: int, buffer: torch.Tensor) -> torch.Tensor:
        start, stop = first * cols, last * cols
        # the piece may begin inside a block: decode from the block's first weight on
        block = start // blocksize
        begin = block * blocksize
        window = buffer[: stop - begin]
        dequantize_out(
            flat_codes[begin // 2 : (stop + 1) // 2],
            flat_absmax[block : -(-stop // blocksize)],
            format,
            blocksize,
            window,
        )
        return window[start - begin :].view(last - first, cols)

    return decode


def check_linear_4bit(
    codes: torch.Tensor,
    scales: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    format: str,
    blocksize: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> None:
    """Raise ValueError unless these describe a matrix [rows, cols] of 4-bit codes."""
    n = rows * cols
    blocks = -(-n // blocksize) if blocksize > 0 else 0
    if nested_absmax is None:
        check_4bit(format, blocksize, dtype, n, codes, scales)
        return
    check_4bit(format, blocksize, dtype, n, codes)
    if nested_offset is None:
        raise ValueError("nested scales need nested_offset")
    check_storage("scales", scales, torch.uint8, blocks)
    check_storage("nested_absmax", nested_absmax, torch.float32, -(-blocks // NESTED_BLOCKSIZE))
    check_storage("nested_offset", nested_offset, torch.float32, 1)
