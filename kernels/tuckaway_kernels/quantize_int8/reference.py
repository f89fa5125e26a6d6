"""Quantize rows to int8 in plain torch: the definition of the op, and its path on the CPU.

LLM.int8() (arXiv 2208.07339) quantizes a weight after rounding it to fp16: ``absmax`` = largest absolute value of
the row, ``code = round_to_even(weight * (127 * reciprocal(absmax)))`` in fp32 with the GPU's reciprocal
(`reciprocal`). A row whose absmax is 0, or infinite (bf16 above 65,504 overflows fp16), gets codes 0, and so does
NaN.
"""

from __future__ import annotations

import torch

from tuckaway_kernels.codebooks import check_dtype, check_storage
from tuckaway_kernels.reciprocal import reciprocal

PIECE = 1 << 18
"""Weights quantized at once (at least one row)."""


def quantize_int8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the rows of ``w``.

    Args:
        w: fp32, fp16 or bf16 ``[..., K]``.

    Returns:
        codes int8 ``[..., K]`` and absmax fp32 ``[rows]``, rows being the product of the leading sizes.

    Raises:
        ValueError: ``w`` has no dimension or an unknown dtype.
    """
    check_int8(w)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    absmax = torch.empty(rows_of(w), dtype=torch.float32, device=w.device)
    quantize_int8_out(w, codes, absmax)
    return codes, absmax


def quantize_int8_out(w: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    """Quantize the rows of ``w`` into ``codes`` and ``absmax`` (see `quantize_int8`).

    Raises:
        ValueError: as `quantize_int8`; codes or absmax of the wrong dtype or size.
    """
    check_int8(w, codes, absmax)
    if w.numel() == 0:
        absmax.zero_()
        return
    columns = w.shape[-1]
    matrix, out, scales = w.reshape(-1, columns), codes.view(-1, columns), absmax.view(-1)
    step = max(PIECE // columns, 1)
    values = torch.empty(min(step, len(matrix)), columns, dtype=torch.float32, device=w.device)
    scratch = torch.empty_like(values)
    for start in range(0, len(matrix), step):
        rows = matrix[start : start + step]
        v, s, scale = values[: len(rows)], scratch[: len(rows)], scales[start : start + step]
        v.copy_(rows.half())
        torch.abs(v, out=s)
        torch.amax(s, 1, out=scale)
        if bool(scale.isnan().any()):
            torch.amax(s.nan_to_num_(nan=0.0, posinf=torch.inf), 1, out=scale)
        v.mul_((127.0 * reciprocal(scale)).unsqueeze(1))
        v.nan_to_num_(nan=0.0).round_()
        out[start : start + step] = v


def rows_of(w: torch.Tensor) -> int:
    """Return the number of rows of ``w`` [..., K]."""
    return w.shape[:-1].numel()


def check_int8(
    w: torch.Tensor, codes: torch.Tensor | None = None, absmax: torch.Tensor | None = None
) -> None:
    """Raise ValueError unless the weights ``w`` [..., K] and the storage for them go together."""
    check_dtype(w.dtype)
    if w.dim() == 0:
        raise ValueError("int8 quantizes rows: the weight needs at least one dimension")
    if codes is not None:
        check_storage("codes", codes, torch.int8, w.numel())
    if absmax is not None:
        check_storage("absmax", absmax, torch.float32, rows_of(w))
