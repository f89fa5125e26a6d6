"""Look up rows of a quantized matrix in plain torch: the definition of the ops, and their path on the CPU.

The values are those of `dequantize_4bit` and `dequantize_int8`, bit for bit.
"""

from __future__ import annotations

import torch

from tuckaway_kernels.codebooks import NESTED_BLOCKSIZE, check_dtype, check_storage, codebook, dynamic_map
from tuckaway_kernels.linear_4bit.reference import check_linear_4bit
from tuckaway_kernels.reciprocal import flush, multiply

PIECE = 1 << 19
"""Weights decoded at once (at least one row)."""


def embedding_4bit(
    index: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    format: str,
    blocksize: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Decode the rows ``index`` of the stored matrix S ``[rows, cols]``.

    Args:
        index: integers from 0 to ``rows - 1``, any shape.
        codes: uint8 with ``(rows * cols + 1) // 2`` elements.
        scales: fp32 absmax, one a block; if nested, their uint8 codes.
        nested_absmax: fp32, one for 256 scales, if the scales are nested.
        nested_offset: fp32, one element, if the scales are nested.
        format: ``"nf4"`` or ``"fp4"``.
        blocksize: weights sharing one scale.
        rows: of S.
        cols: of S.
        dtype: of the result: fp32, fp16 or bf16.

    Returns:
        ``[*index.shape, cols]``. On a GPU a row that is not there comes out as NaN.

    Raises:
        IndexError: a number out of range (on the CPU).
        ValueError: tensors whose shapes or dtypes do not go together.
    """
    check_linear_4bit(codes, scales, nested_absmax, nested_offset, format, blocksize, rows, cols, dtype)
    flat = check_index(index, rows)
    out = torch.empty((flat.numel(), cols), dtype=dtype, device=codes.device)
    packed, blocks = codes.view(-1), scales.view(-1)

    def absmax_of(block: torch.Tensor) -> torch.Tensor:
        """Return the fp32 scales of blocks of weights."""
        scale = blocks[block]
        if nested_absmax is None or nested_offset is None:
            return scale
        inner = flush(nested_absmax.view(-1)[block // NESTED_BLOCKSIZE])
        return flush(dynamic_map(codes.device)[scale.int()] * inner) + nested_offset

    step = max(PIECE // max(cols, 1), 1)
    for start in range(0, flat.numel(), step):
        some, into = flat[start : start + step].unsqueeze(1), out[start : start + step]
        if cols % blocksize == 0 and cols:
            # rows of whole blocks are a matrix of their own, and decoded as one: 0.77 s of 4096x8192 become 0.06
            each = cols // blocksize
            chosen = packed.view(rows, cols // 2).index_select(0, some.view(-1)).view(-1)
            block = some * each + torch.arange(each, device=codes.device)
            torch.ops.tuckaway.dequantize_4bit_out(chosen, absmax_of(block.view(-1)), format, blocksize, into)
        else:
            place = (some * cols + torch.arange(cols, device=codes.device)).view(-1)
            pair = packed[place >> 1].int()
            values = codebook(format, codes.device)[torch.where(place & 1 == 0, pair >> 4, pair & 15)]
            into.copy_(multiply(values, absmax_of(place // blocksize)).view(-1, cols))
    return out.view(*index.shape, cols)


def embedding_int8(
    index: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Decode the rows ``index`` of int8 codes ``[rows, cols]``.

    Args:
        index: integers from 0 to ``rows - 1``, any shape.
        codes: int8 ``[rows, cols]``.
        absmax: fp32 ``[rows]``.
        dtype: of the result: fp32, fp16 or bf16.

    Returns:
        ``[*index.shape, cols]``. On a GPU a row that is not there comes out as NaN.

    Raises:
        IndexError: a number out of range (on the CPU).
        ValueError: tensors whose shapes or dtypes do not go together.
    """
    check_embedding_int8(codes, absmax, dtype)
    flat, cols = check_index(index, codes.shape[0]), codes.shape[1]
    out = torch.empty((flat.numel(), cols), dtype=dtype, device=codes.device)
    step = max(PIECE // max(cols, 1), 1)
    for start in range(0, flat.numel(), step):
        some = flat[start : start + step]
        chosen, scales = codes.index_select(0, some), absmax.view(-1).index_select(0, some)
        torch.ops.tuckaway.dequantize_int8_out(chosen, scales, out[start : start + step])
    return out.view(*index.shape, cols)


def check_index(index: torch.Tensor, rows: int) -> torch.Tensor:
    """Return ``index`` flat, as int64.

    Raises:
        ValueError: not of an integer dtype.
        IndexError: on the CPU, a number out of range.
    """
    if index.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"index must be of an integer dtype, not {index.dtype}")
    flat = index.reshape(-1).long()
    if flat.device.type == "cpu" and flat.numel():
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= rows:
            raise IndexError(f"row {low if low < 0 else high} asked for of a matrix with {rows} rows")
    return flat


def check_embedding_int8(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless codes [rows, cols] and absmax [rows] go together."""
    if codes.dim() != 2:
        raise ValueError(f"codes must be [rows, cols], not {list(codes.shape)}")
    check_dtype(dtype)
    check_storage("codes", codes, torch.int8, codes.numel())
    check_storage("absmax", absmax, torch.float32, codes.shape[0])
