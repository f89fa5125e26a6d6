"""The stream: bytes of a checkpoint in bounded pieces, in file order, through a ring of buffers.

While the caller works on one piece, threads read the next ones, batch by batch as :mod:`~tuckaway.checkpoint.batches`
plans them. Files are read with ``pread``, never mapped: a file that is cut or lost under a mapping kills the process
(SIGBUS), and mapped pages count as the process's memory.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import torch

from tuckaway import files
from tuckaway.checkpoint.batches import Batch, Part, Request, batches, most_bytes, rounded
from tuckaway.checkpoint.entry import JoinedEntry, ResidentEntry, StridedEntry, TensorEntry, open_regular
from tuckaway.checkpoint.progress import Progress
from tuckaway.checkpoint.ring import Ring, Slot
from tuckaway.errors import CheckpointError, ChecksumError, StoreError, TruncatedError

__all__ = ["PIECE_BYTES", "Piece", "read_tensor", "stream"]

PIECE_BYTES = 16 * 2**20
"""Default size of a piece: from 4 MiB up a cold read is as fast as the disk, and two of them are little memory."""


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
    planned = batches(requests, piece_bytes)
    free = deque(ring.slots(most_bytes(requests, piece_bytes)))
    inflight: deque[tuple[Batch, Slot, Any]] = deque()
    sums = _Sums()
    with (
        closing(_Sources(ring.threads)) as sources,
        _bar(total, progress) as bar,
    ):
        threads = ThreadPoolExecutor(ring.threads, thread_name_prefix="tuckaway-read")
        try:
            while True:
                while free and (batch := next(planned, None)) is not None:
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


class _Sums:
    """Puts the checksums of the pieces together, which threads computed in any order."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}  # of the tensors that are under way

    def add(self, part: Part) -> None:
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

    def fill(self, batch: Batch, slot: Slot) -> list[torch.Tensor]:
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
        self.sums: dict[str, list[tuple[int, int, int]]] = {}  # of tensors that are joined, run by run

    def fill(self, batch: Batch, slot: Slot) -> list[torch.Tensor]:
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
                place = part.place - rounded(part.between)
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

    def _whole(self, part: Part) -> torch.Tensor:
        """Return a part of a tensor that cannot be read in parts; it is made once for all of them."""
        if isinstance(part.entry, JoinedEntry):
            return self.joined(part.entry, part.start, part.nbytes // part.entry.dtype.itemsize)
        if self.made is None or self.made[0] is not part.entry:
            self.made = (part.entry, _make(part.entry, self).reshape(-1))
        tensor = self.made[1]
        if part.last:
            self.made = None
        return tensor[part.start : part.start + part.nbytes // part.entry.dtype.itemsize]

    def joined(self, entry: JoinedEntry, start: int, count: int) -> torch.Tensor:
        """Return ``count`` elements of a tensor that lies in parts: only they are read."""
        itemsize = entry.dtype.itemsize
        memory = torch.empty(count * itemsize, dtype=torch.uint8, device="cpu")
        view, place = _bytes(memory), 0
        for source, first, length in entry.overlapping(start, count):
            offset, nbytes = source.offset + first * itemsize, length * itemsize
            self.open(source)
            batch = Batch([Part(source, first, offset, nbytes, place, False)], nbytes)
            own = view[place : place + nbytes]
            self.read([own], offset, batch)
            if source.crc32 is not None:
                self._sum(source, first * itemsize, nbytes, files.crc32(own))
            place += nbytes
        return memory.view(entry.dtype)

    def _sum(self, entry: TensorEntry, start: int, nbytes: int, crc32: int) -> None:
        """Take the checksum of a run, which may come before one that lies before it; compare when all are there."""
        runs = self.sums.setdefault(entry.name, [])
        if runs and sum(runs[-1][:2]) == start:
            before = runs.pop()
            start, nbytes, crc32 = (
                before[0],
                before[1] + nbytes,
                files.crc32_combine(before[2], crc32, nbytes),
            )
        runs.append((start, nbytes, crc32))
        if sum(length for _, length, _ in runs) < entry.nbytes:
            return
        value = 0
        for _, length, part in sorted(self.sums.pop(entry.name)):
            value = files.crc32_combine(value, part, length)
        _compare(entry, value)

    def open(self, entry: TensorEntry) -> None:
        """Make sure that the entry's file is open and still the one that was checked."""
        if self.path != entry.path:
            self.finish()
            self.fd = open_regular(entry.path)
            self.path, self.entry = entry.path, entry
            if entry.identity is not None:
                entry.identity.check(self.fd, entry.path)

    def read(self, views: list[memoryview], offset: int, batch: Batch) -> None:
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

    def _read_some(self, views: list[memoryview], offset: int, batch: Batch) -> int:
        if len(views) == 1 or not hasattr(os, "preadv"):
            try:
                return files.read_at(self.fd, views[0], offset)
            except StoreError as error:
                raise self._failed(error.errno, batch, offset) from error
        try:
            return os.preadv(self.fd, views, offset)
        except OSError as error:
            raise self._failed(error.errno, batch, offset) from error

    def _failed(self, number: int | None, batch: Batch, offset: int) -> CheckpointError:
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


def _names(batch: Batch, offset: int) -> str:
    """Name the tensor that the byte ``offset`` of the file belongs to."""
    inside = [part.entry.name for part in batch.parts if part.offset <= offset < part.offset + part.nbytes]
    return repr((inside or [batch.parts[-1].entry.name])[0])


def _make(entry: TensorEntry, source: _Source) -> torch.Tensor:
    """Read a whole tensor into memory of its own."""
    if isinstance(entry, ResidentEntry):
        return entry.data
    if isinstance(entry, JoinedEntry):
        return source.joined(entry, 0, entry.numel).view(entry.shape)
    nbytes = entry.span if isinstance(entry, StridedEntry) else entry.nbytes
    memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    if nbytes:
        source.open(entry)
        batch = Batch([Part(entry, 0, entry.offset, nbytes, 0, True)], nbytes)
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
