"""Decode int8 rows in plain torch: the definition of the op, and its path on the CPU.

``weight = code * (absmax * 7.874015718698502e-3)`` in fp32 (the constant is the fp32 nearest to
1/127), then one rounding to the dtype asked for.
"""

from __future__ import annotations

from typing import Final

import torch

from tuckaway_kernels.codebooks import check_dtype, check_storage

PIECE = 1 << 18
"""Weights decoded at once (at least one row)."""

INVERSE_127: Final = 7.874015718698502e-3


def dequantize_int8(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Decode ``codes``.

    Args:
        codes: int8 ``[..., K]``.
        absmax: fp32 with one element a row.
        dtype: of the result: fp32, fp16 or bf16.

    Returns:
        ``[..., K]``.

    Raises:
        ValueError: unknown dtype; codes or absmax of the wrong dtype or size.
    """
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    dequantize_int8_out(codes, absmax, out)
    return out


def dequantize_int8_out(codes: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> None:
    """Decode ``codes`` [..., K] into ``out``, contiguous, of as many elements (see `dequantize_int8`).

    Raises:
        ValueError: as `dequantize_int8`; out not contiguous.
    """
    check_int8_codes(codes, absmax, out)
    if codes.numel() == 0:
        return
    columns = codes.shape[-1]
    matrix, result = codes.view(-1, columns), out.view(-1, columns)
    scales = (absmax.view(-1) * INVERSE_127).unsqueeze(1)
    if out.dtype == torch.float32:
        result.copy_(matrix)
        result.mul_(scales)
        return
    step = max(PIECE // columns, 1)
    values = torch.empty(min(step, len(matrix)), columns, dtype=torch.float32, device=codes.device)
    for start in range(0, len(matrix), step):
        rows = matrix[start : start + step]
        v = values[: len(rows)]
        v.copy_(rows)
        v.mul_(scales[start : start + step])
        result[start : start + step] = v


def check_int8_codes(codes: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> None:
    """Raise ValueError unless codes [..., K], absmax [rows] and out go together."""
    if codes.dim() == 0:
        raise ValueError("int8 codes need at least one dimension")
    check_storage("codes", codes, torch.int8, codes.numel())
    check_storage("absmax", absmax, torch.float32, codes.shape[:-1].numel())
    check_dtype(out.dtype)
    check_storage("out", out, out.dtype, codes.numel())
