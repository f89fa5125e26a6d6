"""The ops ``tuckaway::embedding_4bit`` and ``embedding_int8``, and the launches of their kernels."""

from __future__ import annotations

from functools import lru_cache

import torch

from tuckaway_kernels.codebooks import codebook, dynamic_map
from tuckaway_kernels.embedding import reference
from tuckaway_kernels.launching import Launch, has_ptx
from tuckaway_kernels.library import define
from tuckaway_kernels.linear_4bit.reference import check_linear_4bit

LONGEST = 1024
"""Columns a program decodes: a row of 4,096 gives four programs, so that four multiprocessors read a single row."""

WARPS = 4


def launch_4bit(
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
    """Decode rows on their device; see `reference.embedding_4bit`."""
    check_linear_4bit(codes, scales, nested_absmax, nested_offset, format, blocksize, rows, cols, dtype)
    flat = reference.check_index(index, rows)
    out = torch.empty((*index.shape, cols), dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    nested = nested_absmax is not None
    _prepared_4bit(flat.numel(), rows, cols, blocksize, nested)(
        flat,
        codes,
        scales,
        nested_absmax if nested_absmax is not None else scales,
        nested_offset if nested_offset is not None else scales,
        dynamic_map(codes.device),
        codebook(format, codes.device),
        out,
    )
    return out


@lru_cache(maxsize=1024)
def _prepared_4bit(count: int, rows: int, cols: int, blocksize: int, nested: bool) -> Launch:
    from tuckaway_kernels.embedding.kernel import embedding_4bit_kernel

    width = min(1 << (cols - 1).bit_length(), LONGEST)
    constants = {"BLOCKSIZE": blocksize, "NESTED": nested, "COLUMNS": width, "PTX": has_ptx()}
    grid = count, -(-cols // width), 1
    return Launch(embedding_4bit_kernel, grid, (rows, cols), constants, warps=WARPS)


def launch_int8(
    index: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Decode rows on their device; see `reference.embedding_int8`."""
    reference.check_embedding_int8(codes, absmax, dtype)
    rows, cols = codes.shape
    flat = reference.check_index(index, rows)
    out = torch.empty((*index.shape, cols), dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    _prepared_int8(flat.numel(), rows, cols)(flat, codes, absmax, out)
    return out


@lru_cache(maxsize=1024)
def _prepared_int8(count: int, rows: int, cols: int) -> Launch:
    from tuckaway_kernels.embedding.kernel import embedding_int8_kernel

    width = min(1 << (cols - 1).bit_length(), LONGEST)
    grid = count, -(-cols // width), 1
    return Launch(embedding_int8_kernel, grid, (rows, cols), {"COLUMNS": width}, warps=WARPS)


def _fake_4bit(
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
    check_linear_4bit(codes, scales, nested_absmax, nested_offset, format, blocksize, rows, cols, dtype)
    return codes.new_empty((*index.shape, cols), dtype=dtype)


def _fake_int8(
    index: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    reference.check_embedding_int8(codes, absmax, dtype)
    return codes.new_empty((*index.shape, codes.shape[1]), dtype=dtype)


define(
    "embedding_4bit(Tensor index, Tensor codes, Tensor scales, Tensor? nested_absmax, Tensor? nested_offset, "
    "str format, int blocksize, int rows, int cols, ScalarType dtype) -> Tensor",
    reference=reference.embedding_4bit,
    fake=_fake_4bit,
    triton=launch_4bit,
)
define(
    "embedding_int8(Tensor index, Tensor codes, Tensor absmax, ScalarType dtype) -> Tensor",
    reference=reference.embedding_int8,
    fake=_fake_int8,
    triton=launch_int8,
)
