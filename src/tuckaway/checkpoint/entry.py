"""Where one tensor's bytes lie: :class:`TensorEntry`, and the file it lies in as it was when it was checked."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tuckaway import files
from tuckaway.errors import (
    CheckpointError,
    CheckpointNotFound,
    TruncatedError,
    TuckawayError,
    UnsafePathError,
)

__all__ = [
    "FileIdentity",
    "JoinedEntry",
    "ResidentEntry",
    "StridedEntry",
    "TensorEntry",
    "open_regular",
    "reading",
]

_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@contextmanager
def reading(path: object, what: str = "cannot read it") -> Iterator[None]:
    """Turn an ``OSError`` inside into a ``CheckpointError`` that names the path.

    Raises:
        CheckpointNotFound: the file is not there.
        CheckpointError: the system refused.
    """
    try:
        yield
    except TuckawayError:
        raise
    except FileNotFoundError as error:
        raise CheckpointNotFound("no such file", where=path) from error
    except OSError as error:
        raise CheckpointError(f"{what}: {error.strerror or error}", where=path) from error


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells that a file is still the one whose header was read: it changes whenever the bytes do."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, fd: int) -> FileIdentity:
        """Return the identity of an open file."""
        status = os.fstat(fd)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def check(self, fd: int, path: Path) -> None:
        """Make sure that an open file is the one that was checked.

        Raises:
            TruncatedError: it is shorter now.
            CheckpointError: it was replaced or written to.
        """
        with reading(path):
            now = FileIdentity.of(fd)
        if now == self:
            return
        if now.size < self.size:
            raise TruncatedError(
                f"the file was cut after the checkpoint was opened: {self.size} bytes expected, {now.size} found",
                where=path,
                hint="write or download it again",
            )
        raise CheckpointError(
            "the file was changed after the checkpoint was opened",
            where=path,
            hint="open the checkpoint again",
        )


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint: ``nbytes`` bytes from ``offset`` on, row-major, little-endian.

    Args:
        name: full dotted name.
        dtype: dtype of the stored values.
        shape: sizes; ``()`` for a 0-d tensor.
        path: the file.
        offset: first byte in the file.
        nbytes: ``shape`` times the size of ``dtype``.
        identity: the file as it was when its header was checked; ``None``: reads do not compare.
        crc32: checksum of the bytes that whoever wrote the file recorded; ``None``: reads do not compare.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    identity: FileIdentity | None = field(default=None, repr=False, compare=False)
    crc32: int | None = field(default=None, repr=False, compare=False, kw_only=True)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class StridedEntry(TensorEntry):
    """A tensor whose elements lie ``stride`` apart, as pickled views of bigger tensors do.

    It is read whole: ``span`` bytes from ``offset`` on hold all of its elements.
    """

    stride: tuple[int, ...] = ()
    span: int = 0


@dataclass(frozen=True, slots=True)
class JoinedEntry(TensorEntry):
    """A tensor that lies in parts, in other tensors: runs of them, one behind the other, are its elements in order.

    Args:
        runs: tensor, first element of it, and number of elements. Each element of each tensor is in one run.
    """

    runs: tuple[tuple[TensorEntry, int, int], ...] = field(default=(), repr=False, compare=False)

    def overlapping(self, start: int, count: int) -> Iterator[tuple[TensorEntry, int, int]]:
        """Yield the runs that make the ``count`` elements from ``start`` on."""
        at = 0
        for entry, first, length in self.runs:
            low, high = max(start, at), min(start + count, at + length)
            if low < high:
                yield entry, first + low - at, high - low
            at += length
            if at >= start + count:
                return


@dataclass(frozen=True, slots=True)
class ResidentEntry(TensorEntry):
    """A tensor that had to be read with its file, of a format that gives no offsets."""

    data: torch.Tensor = field(default_factory=lambda: torch.empty(0), repr=False, compare=False)


def open_regular(path: Path, held: list[int] | None = None) -> int:
    """Open a file to read, but nothing else that a name can stand for: opening a pipe or a tape can hang or act.

    Args:
        path: which.
        held: gets the number of the open file at once, so that its owner closes it whatever interrupts this.

    Raises:
        CheckpointNotFound: there is none.
        UnsafePathError: a folder, pipe, socket or device.
        CheckpointError: the system refused.
    """
    with reading(path, "cannot open it"):
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise UnsafePathError("this is not a regular file", where=path)
            held = [] if held is None else held
            fd = files.open_held(held, path, _FLAGS)
        except ValueError as error:  # a zero byte in the name
            raise CheckpointError(f"cannot open it: {error}", where=path) from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):  # it was replaced in between
                raise UnsafePathError("this is not a regular file", where=path)
        except BaseException:
            files.close_held(held)
            raise
    return fd
