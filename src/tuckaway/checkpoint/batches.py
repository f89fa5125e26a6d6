"""Which bytes of a checkpoint are read at once, planned from the headers alone: :func:`batches`.

Tensors are cut into parts of bounded size, and parts that lie side by side come with one system call, each scattered
to an aligned place: GPT-2's 48 biases and norms a block would otherwise cost more in calls and thread switches than in
bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tuckaway.checkpoint.entry import TensorEntry

__all__ = ["Batch", "Part", "Request", "batches", "most_bytes", "rounded"]

_SLOT = 64  # bytes that every tensor's piece is aligned to in a buffer: a cache line, and any dtype
_MAX_PARTS = 256  # pieces a system call, with gaps twice as many buffers; Linux takes 1024 at most (IOV_MAX)
_GAP = 64 * 2**10  # bytes that are sooner read and dropped than skipped: a weight's codebooks and state
_WORTH = 4 * 2**20  # bytes of a tensor that are put behind others to fill a piece: less is no better read


@dataclass(frozen=True, slots=True)
class Request:
    """One tensor to read.

    Args:
        entry: where it lies.
        align: every piece starts at a multiple of this many elements, and but for the last ends at one.
        whole: it comes in one piece whatever its size.
        widest: bytes that an element takes while it is worked on, if more than in the file; pieces are smaller then.
    """

    entry: TensorEntry
    align: int = 1
    whole: bool = False
    widest: int = 0


@dataclass(slots=True)
class Part:
    """What one piece is to be: ``nbytes`` bytes of the file, put at ``place`` of a buffer; once read, their CRC-32.

    ``between`` bytes of the file lie before it that nobody wants; they have their room in the buffer before it too.
    """

    entry: TensorEntry
    start: int
    offset: int
    nbytes: int
    place: int
    last: bool
    between: int = 0
    crc32: int | None = None


@dataclass(slots=True)
class Batch:
    """Parts that lie in a row in one file, or nearly so, and are read at once; what lies between is dropped."""

    parts: list[Part] = field(default_factory=list)
    nbytes: int = 0  # of the buffer, gaps for alignment included

    def add(self, entry: TensorEntry, start: int, nbytes: int, last: bool) -> None:
        """Put ``nbytes`` bytes from element ``start`` on behind the other parts."""
        offset = entry.offset + start * entry.dtype.itemsize
        if self.parts and not nbytes:
            offset = self.end  # an empty tensor lies nowhere, whatever the file says
        between = offset - self.end if self.parts else 0
        self.nbytes += rounded(between)
        self.parts.append(Part(entry, start, offset, nbytes, self.nbytes, last, between))
        self.nbytes += rounded(nbytes)

    @property
    def end(self) -> int:
        """The byte of the file behind the last part."""
        return self.parts[-1].offset + self.parts[-1].nbytes

    def room(self, entry: TensorEntry, offset: int, limit: int) -> int:
        """Return how many bytes from ``offset`` on can join; 0 where they lie elsewhere."""
        if not self.parts:
            return limit
        last, between = self.parts[-1], offset - self.end if entry.nbytes else 0
        joins = (
            entry.path == last.entry.path
            and 0 <= between <= _GAP
            and len(self.parts) < _MAX_PARTS
            and type(entry) is type(last.entry) is TensorEntry
        )
        return max(0, limit - self.nbytes - rounded(between)) if joins else 0


def batches(requests: Sequence[Request], piece_bytes: int) -> Iterator[Batch]:
    """Cut tensors into parts and put neighbouring parts together.

    Args:
        requests: in the order of files and of offsets in them.
        piece_bytes: most bytes of a part and of a batch's buffer, where ``align`` and ``whole`` allow.

    Example:
        >>> import torch
        >>> from pathlib import Path
        >>> a = TensorEntry("a", torch.uint8, (100,), Path("f"), 0, 100)
        >>> b = TensorEntry("b", torch.uint8, (8,), Path("f"), 110, 8)
        >>> for batch in batches([Request(a), Request(b)], 80):
        ...     print(batch.nbytes, [(p.entry.name, p.start, p.nbytes, p.between) for p in batch.parts])
        128 [('a', 0, 80, 0)]
        64 [('a', 80, 20, 0)]
        64 [('b', 0, 8, 0)]
    """
    batch = Batch()
    for request in requests:
        entry = request.entry
        size, align = entry.dtype.itemsize, request.align
        step = piece_bytes // max(size, request.widest)
        step = max(1, entry.numel) if request.whole else max(1, step // align) * align
        start = 0
        while start < entry.numel or start == 0:
            count = min(step, entry.numel - start)
            room = batch.room(entry, entry.offset + start * size, piece_bytes) // size // align * align
            worth = bool(batch.parts) and room * size >= _WORTH and not request.whole
            if room < count and not worth:
                if batch.parts:
                    yield batch
                batch = Batch()
            else:
                count = min(count, room)
            batch.add(entry, start, count * size, start + count == entry.numel)
            start += max(count, 1)
    if batch.parts:
        yield batch


def most_bytes(requests: Sequence[Request], piece_bytes: int) -> int:
    """Return how large a buffer every batch fits into, but for one with a part that must be larger."""
    total = sum(request.entry.nbytes for request in requests)
    return min(piece_bytes + _SLOT, total + (_SLOT + _GAP) * len(requests))


def rounded(nbytes: int) -> int:
    """Return ``nbytes`` with what aligns the next part of a buffer.

    >>> rounded(0), rounded(1), rounded(64)
    (0, 64, 64)
    """
    return -(-nbytes // _SLOT) * _SLOT
