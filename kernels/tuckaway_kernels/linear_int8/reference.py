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
from tuckaway_kernels.pieces import Decode, check_product, product_by_pieces, rows_at_once
from tuckaway_kernels.reciprocal import reciprocal

INVERSE_127_SQUARED: Final = 6.200012e-05
"""1 / 127**2 as bitsandbytes' CUDA kernel has it, in fp32 (its default backend has 6.200124e-05, a slip)."""

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
    outliers = outlier_columns(matrix, threshold) if threshold > 0.0 else None
    step = rows_at_once(cols, torch.float32, x.device)  # bounds the temporaries: nothing depends on it
    for first in range(0, matrix.shape[0], step):
        part = slice(first, first + step)
        quantized, scale = quantize_activations(matrix[part].half(), threshold)
        if outliers is not None:
            quantized = quantized * ~outliers
        product = integer_product(quantized, codes).float() * scale.unsqueeze(1) * absmax
        result[part] = _rescale(product, bias)
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


def _rescale(product: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``product / 127**2 + bias`` as fp16."""
    # one rounding for multiply and add, as the fused instruction does it: the product of two fp32 is exact in fp64
    exact = product.double() * torch.tensor(INVERSE_127_SQUARED, dtype=torch.float32).item()
    if bias is None:
        return exact.float().half()
    if bias.dtype == torch.float16:
        return (exact + bias.double()).float().half()
    return (exact.float().half().float() + bias.float()).half()


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
    if x.device.type == "cpu":
        chosen = columns.nonzero().view(-1)
        if chosen.numel() == 0:
            return
        x, codes = x[:, chosen], codes[:, chosen]
    else:
        x = x * columns
    rows, cols = codes.shape
    decode = _decoder(codes, absmax)
    step = min(rows_at_once(cols, x.dtype, x.device), rows)
    buffer = torch.empty(step * cols, dtype=x.dtype, device=x.device)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        part = result[:, first:last]
        part.copy_(torch.addmm(part, x, decode(first, last, buffer).t()))


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
