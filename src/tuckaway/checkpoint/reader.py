"""The stream: bytes of a checkpoint in bounded pieces, in file order, through a ring of buffers.

While the caller works on one piece, threads read the next ones. Files are read with ``pread``, never mapped: a file
that is cut or lost under a mapping kills the process (SIGBUS), and mapped pages count as the process's memory.

Small tensors that lie side by side come with one system call, each scattered to an aligned place: GPT-2's 48 biases
and norms a block would otherwise cost more in calls and thread switches than in bytes.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import torch

from tuckaway import files
from tuckaway.checkpoint.entry import ResidentEntry, StridedEntry, TensorEntry, open_regular
from tuckaway.checkpoint.progress import Progress
from tuckaway.checkpoint.ring import Ring, Slot
from tuckaway.errors import CheckpointError, ChecksumError, StoreError, TruncatedError

__all__ = ["PIECE_BYTES", "Piece", "Request", "read_tensor", "stream"]

PIECE_BYTES = 16 * 2**20
"""Default size of a piece: from 4 MiB up a cold read is as fast as the disk, and two of them are little memory."""

_SLOT = 64  # bytes that every tensor's piece is aligned to in a buffer: a cache line, and any dtype
_MAX_PARTS = 256  # pieces a system call, with gaps twice as many buffers; Linux takes 1024 at most (IOV_MAX)
_GAP = (
    64 * 2**10
)  # bytes that are sooner read and dropped than skipped: a reloaded weight's codebooks and state
_WORTH = 4 * 2**20  # bytes of a tensor that are put behind others to fill a piece: less is no better read


@dataclass(frozen=True, slots=True)
class Request:
    """One tensor to read.

    Args:
        entry: where it lies.
        align: every piece starts at a multiple of this many elements, and but for the last ends at one.
        whole: it comes in one piece whatever its size.
    """

    entry: TensorEntry
    align: int = 1
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one tensor, valid until the next piece is asked for.

    Args:
        entry: the tensor.
        start: its first element in the tensor, row-major.
        tensor: 1-D CPU tensor of the entry's dtype.
        last: the tensor is complete with it.
    """

    entry: TensorEntry
    start: int
    tensor: torch.Tensor
    last: bool


@dataclass(slots=True)
class _Part:
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
class _Batch:
    """Parts that lie in a row in one file, or nearly so, and are read at once; what lies between is dropped."""

    parts: list[_Part] = field(default_factory=list)
    nbytes: int = 0  # of the buffer, gaps for alignment included

    def add(self, entry: TensorEntry, start: int, nbytes: int, last: bool) -> None:
        offset = entry.offset + start * entry.dtype.itemsize
        if self.parts and not nbytes:
            offset = self.end  # an empty tensor lies nowhere, whatever the file says
        between = offset - self.end if self.parts else 0
        self.nbytes += _rounded(between)
        self.parts.append(_Part(entry, start, offset, nbytes, self.nbytes, last, between))
        self.nbytes += _rounded(nbytes)

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
        return max(0, limit - self.nbytes - _rounded(between)) if joins else 0


def stream(
    requests: Sequence[Request],
    *,
    piece_bytes: int = PIECE_BYTES,
    progress: Progress | bool | None = False,
    ring: Ring | None = None,
) -> Iterator[Piece]:
    """Read tensors piece by piece, in the order they lie in the files.

    Memory in use is the ring's slots of ``piece_bytes``, and beyond that only a tensor that must come whole. The
    threads that read ahead end with the iterator: at its end, at an error, or when it is closed.

    Args:
        requests: what to read; the order does not matter.
        piece_bytes: size of a piece at most, where ``align`` and ``whole`` allow.
        progress: show a bar; ``None``: when standard error is a terminal; or one to advance that goes on after.
        ring: how many buffers and threads, and for which device; ``None``: two buffers and a thread.

    Raises:
        ValueError: ``piece_bytes`` or an ``align`` is below 1.
        TruncatedError: while iterating, a file ends before a tensor does.
        ChecksumError: while iterating, before a tensor's last piece, its bytes are not those that were written.
        CheckpointError: while iterating, a file was changed since its header was checked, or the disk failed.

    Example:
        >>> import safetensors.torch, tempfile
        >>> from tuckaway.checkpoint import read_header
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> safetensors.torch.save_file({"w": torch.arange(5)}, path)
        >>> entries = read_header(path).entries
        >>> for piece in stream([Request(entry) for entry in entries.values()], piece_bytes=16):
        ...     print(piece.entry.name, piece.start, piece.tensor.tolist(), piece.last)
        w 0 [0, 1] False
        w 2 [2, 3] False
        w 4 [4] True
    """
    if piece_bytes < 1:
        raise ValueError(f"piece_bytes must be positive, not {piece_bytes}")
    for request in requests:
        if request.align < 1:
            raise ValueError(f"align must be positive, not {request.align} ({request.entry.name!r})")
    ordered = sorted(requests, key=lambda request: (os.fspath(request.entry.path), request.entry.offset))
    return _run(ordered, piece_bytes, progress, ring or Ring())


def _run(
    requests: list[Request], piece_bytes: int, progress: Progress | bool | None, ring: Ring
) -> Iterator[Piece]:
    total = sum(request.entry.nbytes for request in requests)
    batches = _batches(requests, piece_bytes)
    free = deque(ring.slots(min(piece_bytes + _SLOT, total + (_SLOT + _GAP) * len(requests))))
    inflight: deque[tuple[_Batch, Slot, Any]] = deque()
    sums = _Sums()
    with (
        closing(_Sources(ring.threads)) as sources,
        _bar(total, progress) as bar,
    ):
        threads = ThreadPoolExecutor(ring.threads, thread_name_prefix="tuckaway-read")
        try:
            while True:
                while free and (batch := next(batches, None)) is not None:
                    slot = free.popleft()
                    inflight.append((batch, slot, threads.submit(sources.fill, batch, slot)))
                if not inflight:
                    break
                batch, slot, future = inflight.popleft()
                tensors = future.result()
                for part, tensor in zip(batch.parts, tensors, strict=True):
                    sums.add(part)
                    yield Piece(part.entry, part.start, tensor, part.last)
                    bar.update(part.nbytes, part.entry.name)
                del tensors
                slot.handed_over()
                free.append(slot)
        finally:
            threads.shutdown(cancel_futures=True)
        sources.finish()


def _bar(total: int, progress: Progress | bool | None) -> AbstractContextManager[Progress]:
    if isinstance(progress, Progress):
        return nullcontext(progress)
    return Progress(total, "Loading weights", show=progress)


def _batches(requests: list[Request], piece_bytes: int) -> Iterator[_Batch]:
    """Cut tensors into parts and put neighbouring parts together."""
    batch = _Batch()
    for request in requests:
        entry = request.entry
        step = max(1, piece_bytes // entry.dtype.itemsize // request.align) * request.align
        if request.whole:
            step = max(1, entry.numel)
        start = 0
        while start < entry.numel or start == 0:
            offset = entry.offset + start * entry.dtype.itemsize
            count = min(step, entry.numel - start)
            room = (
                batch.room(entry, offset, piece_bytes)
                // entry.dtype.itemsize
                // request.align
                * request.align
            )
            if room < count and not (
                batch.parts and room * entry.dtype.itemsize >= _WORTH and not request.whole
            ):
                if batch.parts:
                    yield batch
                batch = _Batch()
            else:
                count = min(count, room)
            batch.add(entry, start, count * entry.dtype.itemsize, start + count == entry.numel)
            start += max(count, 1)
    if batch.parts:
        yield batch


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _SLOT) * _SLOT


class _Sums:
    """Puts the checksums of the pieces together, which threads computed in any order."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}  # of the tensors that are under way

    def add(self, part: _Part) -> None:
        """Take the next piece of a tensor; the last one compares."""
        if part.crc32 is None:
            return
        value = part.crc32
        if part.start:
            value = files.crc32_combine(self.known.pop(part.entry.name), value, part.nbytes)
        if part.last:
            _compare(part.entry, value)
        else:
            self.known[part.entry.name] = value


def _compare(entry: TensorEntry, value: int) -> None:
    if value != entry.crc32:
        raise ChecksumError(
            f"the bytes of {entry.name!r} changed on disk",
            where=f"{entry.path}, bytes {entry.offset} to {entry.offset + entry.nbytes}",
            hint="write or download it again, or read it with verify_checksums=False",
        )


class _Sources:
    """One set of open files a thread; tensors that cannot be read in parts have one of their own."""

    def __init__(self, count: int) -> None:
        self.all = [_Source() for _ in range(count + 1)]
        self.free: SimpleQueue[_Source] = SimpleQueue()
        for source in self.all[1:]:
            self.free.put(source)
        self.lock = Lock()

    def fill(self, batch: _Batch, slot: Slot) -> list[torch.Tensor]:
        """Read a batch into a slot and return the tensors of its parts."""
        if type(batch.parts[0].entry) is not TensorEntry:
            with self.lock:
                return self.all[0].fill(batch, slot)
        source = self.free.get()
        try:
            return source.fill(batch, slot)
        finally:
            self.free.put(source)

    def finish(self) -> None:
        """Close all files, and complain if one changed while it was read."""
        for source in self.all:
            source.finish()

    def close(self) -> None:
        """Close all files as they are."""
        for source in self.all:
            source.close()


class _Source:
    """The files, one open at a time, as a reading thread uses them."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.fd = -1
        self.entry: TensorEntry | None = None
        self.made: tuple[TensorEntry, torch.Tensor] | None = None

    def fill(self, batch: _Batch, slot: Slot) -> list[torch.Tensor]:
        """Read a batch into a slot and return the tensors of its parts."""
        first = batch.parts[0]
        if type(first.entry) is not TensorEntry:
            return [self._whole(part) for part in batch.parts]
        memory = slot.memory(batch.nbytes)
        view = _bytes(memory)
        self.open(first.entry)
        views = []
        for part in batch.parts:
            if part.between:
                place = part.place - _rounded(part.between)
                views.append(view[place : place + part.between])
            if part.nbytes:
                views.append(view[part.place : part.place + part.nbytes])
        self.read(views, first.offset, batch)
        for part in batch.parts:
            if part.entry.crc32 is not None:
                part.crc32 = files.crc32(view[part.place : part.place + part.nbytes])
        return [
            memory[part.place : part.place + part.nbytes].view(part.entry.dtype)
            if part.nbytes
            else torch.empty(0, dtype=part.entry.dtype, device="cpu")
            for part in batch.parts
        ]

    def _whole(self, part: _Part) -> torch.Tensor:
        """Return a part of a tensor that cannot be read in parts; it is made once for all of them."""
        if self.made is None or self.made[0] is not part.entry:
            self.made = (part.entry, _make(part.entry, self).reshape(-1))
        tensor = self.made[1]
        if part.last:
            self.made = None
        return tensor[part.start : part.start + part.nbytes // part.entry.dtype.itemsize]

    def open(self, entry: TensorEntry) -> None:
        """Make sure that the entry's file is open and still the one that was checked."""
        if self.path != entry.path:
            self.finish()
            self.fd = open_regular(entry.path)
            self.path, self.entry = entry.path, entry
            if entry.identity is not None:
                entry.identity.check(self.fd, entry.path)

    def read(self, views: list[memoryview], offset: int, batch: _Batch) -> None:
        """Fill all views with what lies from ``offset`` on."""
        end = offset + sum(len(view) for view in views)
        while views:
            got = self._read_some(views, offset, batch)
            if got == 0:
                raise TruncatedError(
                    f"the file ends inside {_names(batch, offset)}: {end} bytes expected, {offset} found",
                    where=batch.parts[0].entry.path,
                    hint="write or download it again",
                )
            offset += got
            while views and got >= len(views[0]):
                got -= len(views.pop(0))
            if got:
                views[0] = views[0][got:]

    def _read_some(self, views: list[memoryview], offset: int, batch: _Batch) -> int:
        if len(views) == 1 or not hasattr(os, "preadv"):
            try:
                return files.read_at(self.fd, views[0], offset)
            except StoreError as error:
                raise self._failed(error.errno, batch, offset) from error
        try:
            return os.preadv(self.fd, views, offset)
        except OSError as error:
            raise self._failed(error.errno, batch, offset) from error

    def _failed(self, number: int | None, batch: _Batch, offset: int) -> CheckpointError:
        reason = os.strerror(number or errno.EIO)
        return CheckpointError(
            f"cannot read {_names(batch, offset)}: {reason}",
            where=f"{batch.parts[0].entry.path}, byte {offset}",
        )

    def finish(self) -> None:
        """Close the file, and complain if it changed while it was read."""
        try:
            if self.fd >= 0 and self.entry is not None and self.entry.identity is not None:
                self.entry.identity.check(self.fd, self.entry.path)
        finally:
            self.close()

    def close(self) -> None:
        """Close the file as it is."""
        if self.fd >= 0:
            files.close(self.fd)
        self.fd, self.path, self.entry = -1, None, None


def _bytes(memory: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor of uint8, to be written to."""
    array: Any = memory.numpy()
    return memoryview(array)


def _names(batch: _Batch, offset: int) -> str:
    """Name the tensor that the byte ``offset`` of the file belongs to."""
    inside = [part.entry.name for part in batch.parts if part.offset <= offset < part.offset + part.nbytes]
    return repr((inside or [batch.parts[-1].entry.name])[0])


def _make(entry: TensorEntry, source: _Source) -> torch.Tensor:
    """Read a whole tensor into memory of its own."""
    if isinstance(entry, ResidentEntry):
        return entry.data
    nbytes = entry.span if isinstance(entry, StridedEntry) else entry.nbytes
    memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    if nbytes:
        source.open(entry)
        batch = _Batch([_Part(entry, 0, entry.offset, nbytes, 0, True)], nbytes)
        source.read([_bytes(memory)], entry.offset, batch)
    if entry.crc32 is not None:
        _compare(entry, files.crc32(_bytes(memory)))
    values = memory.view(entry.dtype)
    if isinstance(entry, StridedEntry):
        return values.as_strided(entry.shape, entry.stride).contiguous()
    return values.view(entry.shape)


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """Read one tensor whole, into memory of its own.

    Raises:
        TruncatedError: its file ends before it does.
        CheckpointError: its file was changed since its header was checked, or the disk failed.
    """
    with closing(_Source()) as source:
        return _make(entry, source).reshape(entry.shape)
