"""The product by a matrix that is decoded a piece at a time: bounded memory, whatever the size of the weight.

A piece is a run of whole rows, so that where it begins depends on shapes alone and the same call gives the same bits
every time. Nothing here waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Final

import torch

PIECE_BYTES: Final = {"cpu": 16 << 20}
"""Decoded weights held at once, by type of device; on the CPU little, because a product may copy them once more."""

DEFAULT_PIECE_BYTES: Final = 64 << 20
"""On GPUs: 8192 x 4096 bf16 weights keep every multiprocessor of an H100 busy in the product."""

AHEAD_ROWS: Final = 1024
"""Rows of x from which pieces are decoded while the one before is multiplied."""

CACHED_PIECE_BYTES: Final = 32 << 20
"""As much as an H100's second-level cache holds until it is multiplied: 8192x8192, 4,096 rows of x: 767 to 746 us."""

CACHED_ROWS: Final = 2048
"""Rows of x with which even so small a piece keeps every multiprocessor busy; with 1,024 it is 8 us slower."""

Decode = Callable[[int, int, torch.Tensor], torch.Tensor]
"""``decode(first, last, buffer)`` decodes rows first to last - 1 into the flat buffer: ``[last - first, cols]``."""


def rows_at_once(cols: int, dtype: torch.dtype, device: torch.device, unit: int = 1, m: int = 1) -> int:
    """Return how many rows a piece has for ``m`` rows of x: at least one, a multiple of ``unit`` where it can be."""
    many = CACHED_PIECE_BYTES if m >= CACHED_ROWS else DEFAULT_PIECE_BYTES
    limit = PIECE_BYTES.get(device.type, many)
    rows = max(limit // (dtype.itemsize * max(cols, 1)), 1)
    return rows - rows % unit if rows >= unit else rows


def product_by_pieces(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    cols: int,
    transpose: bool,
    compute_dtype: torch.dtype,
    decode: Decode,
    *,
    unit: int = 1,
    spare: int = 0,
) -> torch.Tensor:
    """Return ``x @ S^T + bias`` (``transpose``) or ``x @ S + bias`` for a stored matrix S ``[rows, cols]``.

    Args:
        x: ``[..., cols]`` if ``transpose``, else ``[..., rows]``; cast to ``compute_dtype``.
        bias: one value an output column, or None; cast to ``compute_dtype``.
        rows: of the stored matrix.
        cols: of the stored matrix.
        transpose: multiply by the stored matrix transposed, as ``F.linear`` does.
        compute_dtype: weights are decoded to it; products accumulate in fp32.
        decode: gives rows of the stored matrix.
        unit: pieces start at a multiple of this row where they can.
        spare: elements the buffer has beyond a piece, for decoders that begin before it.

    Returns:
        ``[..., rows]`` or ``[..., cols]`` in the dtype of ``x``.

    Raises:
        ValueError: the last dimension of ``x``, or the bias, does not fit the matrix.
    """
    inner, outer = (cols, rows) if transpose else (rows, cols)
    check_product(x, bias, inner, outer)
    shape = (*x.shape[:-1], outer)
    matrix = x.reshape(-1, inner).to(compute_dtype)
    added = None if bias is None else bias.to(compute_dtype)
    if matrix.shape[0] == 0 or rows == 0 or cols == 0:
        result = torch.zeros((matrix.shape[0], outer), dtype=compute_dtype, device=x.device)
        return (result if added is None else result + added).to(x.dtype).view(shape)
    # the fp16 product of a CPU is twenty times slower than fp32's: same weights, rounded to fp16, multiplied in fp32
    widen = compute_dtype == torch.float16 and x.device.type == "cpu"
    work = torch.float32 if widen else compute_dtype
    matrix, added = matrix.to(work), None if added is None else added.to(work)
    dtype = torch.float32 if widen else compute_dtype
    step = min(rows_at_once(cols, dtype, x.device, unit, matrix.shape[0]), rows)
    buffer = torch.empty(step * cols + spare, dtype=compute_dtype, device=x.device)
    if step >= rows:
        weights = decode(0, rows, buffer).to(work)
        right = weights.t() if transpose else weights
        result = matrix @ right if added is None else torch.addmm(added, matrix, right)
    elif transpose:
        result = torch.empty((matrix.shape[0], rows), dtype=work, device=x.device)
        decoded = decoded_ahead if x.device.type == "cuda" and matrix.shape[0] >= AHEAD_ROWS else decoded_each
        for first, last, weights in decoded(decode, rows, step, buffer, x.device):
            part, right = result[:, first:last], weights.to(work).t()
            if added is None:
                torch.mm(matrix, right, out=part)
            else:
                torch.addmm(added[first:last], matrix, right, out=part)
    else:
        total = torch.zeros((matrix.shape[0], cols), dtype=torch.float32, device=x.device)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            total += matrix[:, first:last] @ decode(first, last, buffer).to(work)
        result = total if added is None else total.add_(added)
    return result.to(compute_dtype).to(x.dtype).view(shape)


def decoded_each(
    decode: Decode, rows: int, step: int, buffer: torch.Tensor, device: torch.device
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield first and last row and the weights of each piece, decoded into one buffer."""
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield first, last, decode(first, last, buffer)


def decoded_ahead(
    decode: Decode, rows: int, step: int, buffer: torch.Tensor, device: torch.device
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """As `decoded_each`, each piece but the first decoded on another stream while the one before it is used.

    The caller's stream waits for every piece before it is given, so that when the last was given nothing is left on the
    other stream: what it read may be freed. Events alone order the two, which a CUDA graph can capture.
    """
    main, side = torch.cuda.current_stream(device), _side_stream(device)
    buffers = buffer, torch.empty_like(buffer)
    side.wait_stream(main)
    used: list[torch.cuda.Event] = []
    starts = list(range(0, rows, step))

    def start(i: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        with torch.cuda.stream(side):
            if i >= 2:
                side.wait_event(used[i - 2])
            return decode(starts[i], min(starts[i] + step, rows), buffers[i % 2]), side.record_event()

    following = start(0)
    for i, first in enumerate(starts):
        weights, ready = following
        main.wait_event(ready)
        if i + 1 < len(starts):
            following = start(i + 1)
        yield first, min(first + step, rows), weights
        used.append(main.record_event())


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def check_product(x: torch.Tensor, bias: torch.Tensor | None, inner: int, outer: int) -> None:
    """Raise ValueError unless ``x`` [..., inner] and ``bias`` [outer] fit the matrix."""
    if x.dim() == 0 or x.shape[-1] != inner:
        raise ValueError(f"x must be [..., {inner}] for this weight, not {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating-point dtype, not {x.dtype}")
    if bias is not None and tuple(bias.shape) != (outer,):
        raise ValueError(f"bias must be [{outer}] for this weight, not {list(bias.shape)}")


def alignment_rows(cols: int, blocksize: int) -> int:
    """Return the smallest number of rows of ``cols`` weights that is a whole number of blocks."""
    return blocksize // math.gcd(max(cols, 1), blocksize)
