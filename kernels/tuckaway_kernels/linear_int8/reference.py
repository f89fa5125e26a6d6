"""Multiply by an int8 matrix in plain torch: the definition of the op, and its path on the CPU.

Without a threshold the weights are decoded and multiplied in ``compute_dtype``, a piece at a time (`pieces`).

With one it is LLM.int8() (arXiv 2208.07339), with the constants of bitsandbytes' CUDA kernels. ``x`` is rounded to
fp16. An entry is an outlier if its magnitude is at least the threshold (0.0: there are none). Each row of ``x`` is
quantized as rows of weights are (`quantize_int8`), its scale taken over the entries that are no outliers; columns with
an outlier are zeroed and multiplied apart, in the dtype of ``x``, by decoded weights:

    y = fp16(product * absmax_x * absmax_w * 6.200012e-05 + bias),    y = y + x[:, outliers] @ W[:, outliers]^T

The bottleneck of fp16 is there for every dtype. A bias that is not fp16 is added after the rounding to fp16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from tuckaway_kernels.codebooks import check_dtype, check_storage
from tuckaway_kernels.piece_sizes import rows_at_once
from tuckaway_kernels.pieces import Decode, check_product, product_by_pieces
from tuckaway_kernels.reciprocal import reciprocal

INVERSE_127_SQUARED: Final = 6.200012e-05
"""1 / 127**2 as bitsandbytes' CUDA kernel has it, in fp32 (its default backend has 6.200124e-05, a slip)."""

TEMPORARY_BYTES: Final = 16 << 20
"""Of what LLM.int8() keeps beside x and result, per step on the way."""

RESCALED: Final = 1 << 18
"""Products brought to fp16 at once."""

EXACT_COLUMNS: Final = 1024
"""Products of int8 codes that fp32 adds up without rounding: 1024 * 127 * 128 < 2**24."""


def linear_int8(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float | None,
    transpose: bool,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply by the matrix S ``[rows, cols]`` of int8 codes, or by its transpose.

    Args:
        x: ``[..., cols]`` if ``transpose``, else ``[..., rows]``; fp32, fp16 or bf16.
        codes: int8 ``[rows, cols]``.
        absmax: fp32 ``[rows]``.
        bias: ``[rows]`` if ``transpose``, else ``[cols]``; or None.
        threshold: None multiplies by decoded weights; a number does LLM.int8() with that outlier threshold.
        transpose: ``x @ S^T`` as in ``F.linear``; else ``x @ S``, for which there is no LLM.int8().
        compute_dtype: dtype of the product without threshold.

    Returns:
        ``[..., rows]`` or ``[..., cols]`` in the dtype of ``x``.

    Raises:
        ValueError: unknown dtype, tensors that do not go together, a negative threshold, or one with ``x @ S``.
    """
    check_linear_int8(codes, absmax, threshold, transpose, compute_dtype)
    rows, cols = codes.shape
    if threshold is None:
        return product_by_pieces(x, bias, rows, cols, transpose, compute_dtype, _decoder(codes, absmax))
    check_product(x, bias, cols, rows)
    matrix = x.reshape(-1, cols)
    result = torch.empty((matrix.shape[0], rows), dtype=x.dtype, device=x.device)
    # runs of rows bound the temporaries, 20 bytes a value of x and 4 of the result; nothing depends on them
    step = max(TEMPORARY_BYTES // (20 * cols + 4 * rows), 1)
    runs = [slice(first, first + step) for first in range(0, matrix.shape[0], step)]
    outliers = None
    if threshold > 0.0:
        outliers = torch.zeros(cols, dtype=torch.bool, device=x.device)
        for run in runs:
            outliers |= outlier_columns(matrix[run], threshold)
    for run in runs:
        quantized, scale = quantize_activations(matrix[run].half(), threshold)
        if outliers is not None:
            quantized.mul_(~outliers)
        product = integer_product(quantized, codes)
        _rescale(product, scale, absmax, bias, result[run])
    if outliers is not None:
        _add_outliers(matrix, outliers, codes, absmax, result)
    return result.view(*x.shape[:-1], rows)


def quantize_activations(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows of ``x`` fp16 ``[M, K]``: int8 codes, outliers zero, and fp32 absmax ``[M]`` over the others."""
    values = x.float()
    if threshold > 0.0:
        values = values.masked_fill(values.abs() >= threshold, 0.0)
    scale = values.abs().amax(1)
    codes = (values * (127.0 * reciprocal(scale)).unsqueeze(1)).nan_to_num_(nan=0.0).round_()
    return codes.to(torch.int8), scale


def outlier_columns(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return which columns of ``x`` [M, K], rounded to fp16, hold an outlier: bool ``[K]``."""
    return (x.half().abs() >= threshold).any(0)


def _rescale(
    product: torch.Tensor,
    x_scales: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    result: torch.Tensor,
) -> None:
    """Write int32 ``product`` [M, N] times ``x_scales`` [M], ``scales`` [N] and 1 / 127**2, plus bias, as fp16."""
    inverse = torch.tensor(INVERSE_127_SQUARED, dtype=torch.float32).item()
    width = max(RESCALED // max(product.shape[0], 1), 1)
    for first in range(0, product.shape[1], width):
        part = slice(first, first + width)
        scaled = product[:, part].float() * x_scales.unsqueeze(1) * scales[part]
        # one rounding for multiply and add, as the fused instruction does it: the product of two fp32 is exact in fp64
        exact = scaled.double() * inverse
        if bias is None:
            half = exact.float().half()
        elif bias.dtype == torch.float16:
            half = (exact + bias[part].double()).float().half()
        else:
            half = (exact.float().half().float() + bias[part].float()).half()
        result[:, part] = half


def integer_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return ``left @ right^T`` of int8 matrices ``[M, K]`` and ``[N, K]``, exactly: int32 ``[M, N]``."""
    if left.device.type == "cpu":
        return torch._int_mm(left, right.t())
    total = torch.zeros((left.shape[0], right.shape[0]), dtype=torch.int32, device=left.device)
    for first in range(0, left.shape[1], EXACT_COLUMNS):
        part = slice(first, first + EXACT_COLUMNS)
        total += (left[:, part].float() @ right[:, part].float().t()).to(torch.int32)
    return total


def _add_outliers(
    x: torch.Tensor, columns: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, result: torch.Tensor
) -> None:
    """Add ``x[:, outliers] @ W[:, outliers]^T`` to ``result``, in the dtype of ``x``.

    On a GPU every column is multiplied, those without outliers being zero, so that nothing waits for the
    device to say which they are; on the CPU only the outlier columns.
    """
    rows, cols = codes.shape
    if x.device.type == "cpu":
        chosen = columns.nonzero().view(-1)
        cols = chosen.numel()
        if cols == 0:
            return
    else:
        chosen, x = None, x * columns
    step = min(rows_at_once(cols, x.dtype, x.device), rows)
    buffer = torch.empty(step * cols, dtype=x.dtype, device=x.device)
    run = max(TEMPORARY_BYTES // (4 * (cols + step)), 1) if chosen is not None else x.shape[0]
    for first in range(0, rows, step):
        some = slice(first, min(first + step, rows))
        these = codes[some] if chosen is None else codes[some].index_select(1, chosen)
        weights = buffer[: these.numel()].view(these.shape)
        torch.ops.tuckaway.dequantize_int8_out(these, absmax[some], weights)
        for start in range(0, x.shape[0], run):
            left = x[start : start + run]
            part = result[start : start + run, some]
            left = left if chosen is None else left.index_select(1, chosen)
            part.copy_(torch.addmm(part, left, weights.t()))


def decoder(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    dequantize_out: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None],
) -> Decode:
    """Return what decodes rows of the matrix for `pieces`, by ``dequantize_out``."""
    flat = absmax.view(-1)

    def decode(first: int, last: int, buffer: torch.Tensor) -> torch.Tensor:
        weights = buffer[: (last - first) * codes.shape[1]].view(last - first, codes.shape[1])
        dequantize_out(codes[first:last], flat[first:last], weights)
        return weights

    return decode


def _decoder(codes: torch.Tensor, absmax: torch.Tensor) -> Decode:
    return decoder(codes, absmax, torch.ops.tuckaway.dequantize_int8_out)


def check_linear_int8(
    codes: torch.Tensor, absmax: torch.Tensor, threshold: float | None, transpose: bool, dtype: torch.dtype
) -> None:
    """Raise ValueError unless these describe a matrix of int8 codes and a product with it."""
    if codes.dim() != 2:
        raise ValueError(f"codes must be [rows, cols], not {list(codes.shape)}")
    check_dtype(dtype)
    check_storage("codes", codes, torch.int8, codes.numel())
    check_storage("absmax", absmax, torch.float32, codes.shape[0])
    if threshold is not None and not transpose:
        raise ValueError("LLM.int8() multiplies by the transposed matrix only: threshold must be None")
    if threshold is not None and not threshold >= 0.0:
        raise ValueError(f"threshold must be 0.0 or more, not {threshold}")
