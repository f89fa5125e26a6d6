"""The product by a matrix that is decoded a piece at a time: bounded memory, whatever the size of the weight.

A piece is a run of whole rows, so that where it begins depends on shapes alone and the same call gives the same bits
every time. Nothing here waits for a device. On a CPU ``x`` is taken in runs of rows too, where it or the result is
cast: 64 MiB beside inputs and result is the most that any op takes there (`tests/kernels/test_memory.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Final

import torch

from tuckaway_kernels.piece_sizes import decodes_ahead, rows_of_pieces

CPU_TEMPORARY_BYTES: Final = 12 << 20
"""Of ``x`` cast to the dtype of the product, and the result before it is cast back, on a CPU."""

Decode = Callable[[int, int, torch.Tensor], torch.Tensor]
"""``decode(first, last, buffer)`` decodes rows first to last - 1 into the flat buffer: ``[last - first, cols]``."""


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
    out: torch.Tensor | None = None,
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
        out: where the result goes, contiguous, in the dtype of ``x``; None: it is allocated.

    Returns:
        ``[..., rows]`` or ``[..., cols]`` in the dtype of ``x``.

    Raises:
        ValueError: the last dimension of ``x``, or the bias, does not fit the matrix.
    """
    inner, outer = (cols, rows) if transpose else (rows, cols)
    check_product(x, bias, inner, outer)
    shape = (*x.shape[:-1], outer)
    flat = x.reshape(-1, inner)
    if flat.shape[0] == 0 or rows == 0 or cols == 0:
        out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
        return out.zero_() if bias is None else out.copy_(bias.to(compute_dtype))
    cpu = x.device.type == "cpu"
    # the fp16 product of a CPU is twenty times slower than fp32's: same weights, rounded to fp16, multiplied in fp32
    work = torch.float32 if cpu and compute_dtype == torch.float16 else compute_dtype
    step = rows_of_pieces(rows, cols, work, x.device, unit, flat.shape[0])
    buffer = torch.empty(step * cols + spare, dtype=compute_dtype, device=x.device)
    added = None if bias is None else bias.to(compute_dtype).to(work)
    pieces = _Pieces(decode, rows, step, buffer, work)
    if cpu:
        out = torch.empty(shape, dtype=x.dtype) if out is None else out
        multiply = _transposed_on_cpu if transpose else _untransposed_on_cpu
        multiply(flat, added, pieces, compute_dtype, out.view(-1, outer))
        return out
    multiply_whole = _transposed if transpose else _untransposed
    result = multiply_whole(flat.to(compute_dtype), added, pieces).to(compute_dtype).to(x.dtype).view(shape)
    return result if out is None else out.copy_(result)


class _Pieces:
    """The matrix in pieces of ``step`` rows, decoded into ``buffer`` and then in the dtype of the product."""

    def __init__(self, decode: Decode, rows: int, step: int, buffer: torch.Tensor, work: torch.dtype) -> None:
        self.rows, self.step, self.buffer, self.work = rows, step, buffer, work
        self.decode = decode

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for first, last, weights in decoded_each(self.decode, self.rows, self.step, self.buffer):
            yield slice(first, last), weights.to(self.work)

    def whole(self) -> torch.Tensor | None:
        """Return the matrix, if it is one piece."""
        return self.decode(0, self.rows, self.buffer).to(self.work) if self.step >= self.rows else None


def _transposed(x: torch.Tensor, added: torch.Tensor | None, pieces: _Pieces) -> torch.Tensor:
    """Return ``x @ S^T + added``."""
    weights = pieces.whole()
    if weights is not None:
        return x @ weights.t() if added is None else torch.addmm(added, x, weights.t())
    result = torch.empty((x.shape[0], pieces.rows), dtype=x.dtype, device=x.device)
    ahead = decodes_ahead(x.shape[0], pieces.rows, x.shape[1], x.device)
    decoded = decoded_ahead if ahead else decoded_each
    for first, last, weights in decoded(pieces.decode, pieces.rows, pieces.step, pieces.buffer):
        part = result[:, first:last]
        if added is None:
            torch.mm(x, weights.t(), out=part)
        else:
            torch.addmm(added[first:last], x, weights.t(), out=part)
    return result


def _untransposed(x: torch.Tensor, added: torch.Tensor | None, pieces: _Pieces) -> torch.Tensor:
    """Return ``x @ S + added``, in fp32 where it is the sum of several products."""
    weights = pieces.whole()
    if weights is not None:
        return x @ weights if added is None else torch.addmm(added, x, weights)
    total: torch.Tensor | None = None
    for rows, weights in pieces:
        product = x[:, rows] @ weights
        total = product.float() if total is None else total.add_(product)
    if total is None:
        raise ValueError("a matrix without rows has no pieces")
    return total if added is None else total.add_(added)


def _runs(m: int, row_bytes: int) -> Iterator[slice]:
    """Yield runs of the ``m`` rows of x whose temporaries, ``row_bytes`` a row, stay in `CPU_TEMPORARY_BYTES`."""
    step = max(CPU_TEMPORARY_BYTES // max(row_bytes, 1), 1)
    return (slice(first, min(first + step, m)) for first in range(0, m, step))


def _transposed_on_cpu(
    x: torch.Tensor,
    added: torch.Tensor | None,
    pieces: _Pieces,
    compute_dtype: torch.dtype,
    result: torch.Tensor,
) -> None:
    """Write ``x @ S^T + added`` to ``result`` [m, rows], rounded to ``compute_dtype`` and then to its own dtype."""
    m, cols = x.shape
    cast = x.dtype != compute_dtype or x.dtype != pieces.work
    for columns, weights in pieces:
        some = None if added is None else added[columns]
        for run in _runs(m, 4 * (cols + pieces.step) if cast else 0):
            left, part = x[run].to(compute_dtype).to(pieces.work), result[run, columns]
            target = torch.empty(part.shape, dtype=pieces.work) if cast else part
            if some is None:
                torch.mm(left, weights.t(), out=target)
            else:
                torch.addmm(some, left, weights.t(), out=target)
            if cast:
                part.copy_(target.to(compute_dtype))


def _untransposed_on_cpu(
    x: torch.Tensor,
    added: torch.Tensor | None,
    pieces: _Pieces,
    compute_dtype: torch.dtype,
    result: torch.Tensor,
) -> None:
    """Write ``x @ S + added`` to ``result`` [m, cols], the products of pieces added up in fp32."""
    m, rows = x.shape
    cols = result.shape[1]
    # the sum in fp32 beside a product or the sum in 16 bits, and x where it is cast; every run decodes the matrix again
    cast = x.dtype != compute_dtype or x.dtype != pieces.work
    for run in _runs(m, 6 * cols + (4 * rows if cast else 0)):
        left = x[run].to(compute_dtype).to(pieces.work)
        total = torch.zeros((left.shape[0], cols), dtype=torch.float32)
        for columns, weights in pieces:
            if pieces.work == torch.float32:
                total.addmm_(left[:, columns], weights)
            else:
                total += left[:, columns] @ weights
        if added is not None:
            total.add_(added)
        result[run].copy_(total.to(compute_dtype))


def decoded_each(
    decode: Decode, rows: int, step: int, buffer: torch.Tensor
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield first and last row and the weights of each piece, decoded into one buffer."""
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield first, last, decode(first, last, buffer)


def decoded_ahead(
    decode: Decode, rows: int, step: int, buffer: torch.Tensor
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """As `decoded_each`, each piece but the first decoded on another stream while the one before it is used.

    The caller's stream waits for every piece before it is given, so that when the last was given nothing is left on the
    other stream: what it read may be freed. Events alone order the two, which a CUDA graph can capture.
    """
    main, side = torch.cuda.current_stream(buffer.device), _side_stream(buffer.device)
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
