"""Cells of a store's file, read and checked: :class:`CellReader`.

A page that the page cache holds is copied out of it (6 GB/s a thread). Any other is read around it with ``O_DIRECT``,
straight into the caller's memory: a store is read in a cycle, and a cycle larger than the cache would push out of it
what is needed next, and everybody else's files too.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from tuckaway import files
from tuckaway.errors import ChecksumError, StoreCorrupt, StoreError
from tuckaway.paging.checksums import cells
from tuckaway.paging.manifest import REMOVE
from tuckaway.paging.page import EXTENT, PageLayout, aligned
from tuckaway.paging.residency import PageCache

__all__ = ["CellReader", "byte_view"]

logger = logging.getLogger("tuckaway")


_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class CellReader:
    """Reads one file of pages. Safe to use from several threads.

    Args:
        path: for messages.
        fd: the open file; it stays the caller's.
        layouts: one a page.
        starts: where each page begins in the file, bytes.
        checksums: of every cell, by page.
        cell: bytes of a cell, a multiple of 4096.
        direct: read around the page cache. ``None``: what the cache does not hold.
    """

    def __init__(
        self,
        path: Path,
        fd: int,
        layouts: Sequence[PageLayout],
        starts: Sequence[int],
        checksums: list[list[int]],
        cell: int,
        *,
        direct: bool | None = None,
    ) -> None:
        self.path = path
        self.direct = direct
        self.checksums = checksums
        self._fd = fd
        self._layouts = layouts
        self._starts = starts
        self._cells = [cells(layout.nbytes, cell) for layout in layouts]
        self.cell = cell
        self._verified: set[tuple[int, int]] = set()
        self._guard = threading.Lock()
        self._identity = self._look()
        self._cache = PageCache(fd, self._identity[2])
        self._held: list[int] = []
        self._direct_fd = _around_the_cache(fd, self._held)

    def refresh(self) -> None:
        """Check everything again if the file changed since it was last looked at; once a page is often enough."""
        now = self._look()
        with self._guard:
            if now != self._identity:
                logger.debug("%s changed since it was opened: checking it again", self.path)
                self._verified.clear()
                self._identity = now

    def cells(self, index: int) -> list[tuple[int, int]]:
        """Return first byte and size of every cell of page ``index``."""
        return self._cells[index]

    def goes_around(self, index: int) -> bool:
        """Decide how to read page ``index``: around the page cache, unless that holds half of it or more."""
        if self.direct is not None or self._direct_fd < 0:
            return bool(self.direct)
        return not self._cache.holds(self._starts[index], self._layouts[index].nbytes)

    def read(self, index: int, number: int, out: torch.Tensor, *, around: bool | None = None) -> None:
        """Read cell ``number`` of page ``index``; its checksum is compared the first time.

        Args:
            index: the page.
            number: the cell.
            out: uint8 ``[n]`` on the CPU. To be read around the page cache it must begin at a multiple of 4096 and
                have room for one: then bytes behind the cell are overwritten too.
            around: read around the page cache. ``None``: as :meth:`goes_around` says.

        Raises:
            StoreCorrupt: the file is shorter than it was.
            ChecksumError: bytes changed on disk.
            StoreError: the disk failed.
        """
        start, size = self._cells[index][number]
        if out.numel() < size:
            raise ValueError(f"a cell of {size} bytes does not fit into {out.numel()}")
        around = self.goes_around(index) if around is None else around
        self._read(out, self._starts[index] + start, size, around=around)
        if self._unknown(index, number):
            self._check(index, number, byte_view(out)[:size])

    def read_range(self, index: int, offset: int, out: torch.Tensor) -> None:
        """Read any bytes of page ``index``; whole cells are read and checked where they were not yet."""
        self.refresh()
        end, at = offset + out.numel(), offset
        while at < end:
            number = at // self.cell
            start, size = self._cells[index][number]
            part = out[at - offset : min(end, start + size) - offset]
            if part.numel() == size or not self._unknown(index, number):
                self._read(part, self._starts[index] + at, part.numel())
                if self._unknown(index, number):
                    self._check(index, number, byte_view(part))
            else:
                whole = torch.empty(size, dtype=torch.uint8)
                self.read(index, number, whole)
                part.copy_(whole[at - start : at - start + part.numel()])
            at += part.numel()

    def changed(self, index: int, offset: int, nbytes: int) -> None:
        """Compute checksums anew where the caller wrote to the file."""
        first, last = offset // self.cell, (offset + nbytes - 1) // self.cell
        for number in range(first, last + 1 if nbytes else first):
            start, size = self._cells[index][number]
            out = torch.empty(size, dtype=torch.uint8)
            self._read(out, self._starts[index] + start, size)
            self.checksums[index][number] = files.crc32(byte_view(out))
        with self._guard:
            self._identity = self._look()

    def _read(self, out: torch.Tensor, offset: int, nbytes: int, *, around: bool = False) -> None:
        if self._fd < 0:
            raise StoreError("the store is closed", where=self.path)
        view = byte_view(out)
        fits = not (out.data_ptr() | offset) % EXTENT and out.numel() >= aligned(nbytes, EXTENT)
        if around and fits and self.direct is not False and self._direct_fd >= 0:
            try:
                got = files.read_at(self._direct_fd, view[: aligned(nbytes, EXTENT)], offset, self.path)
            except StoreError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                logger.debug("%s cannot be read around the page cache", self.path, exc_info=True)
                self.direct = False
                got = files.read_at(self._fd, view[:nbytes], offset, self.path)
        else:
            got = files.read_at(self._fd, view[:nbytes], offset, self.path)
        if got < nbytes:
            raise StoreCorrupt(
                "the file ends too early", where=f"{self.path}, byte {offset + got}", hint=REMOVE
            )

    def _unknown(self, index: int, number: int) -> bool:
        return (index, number) not in self._verified

    def _check(self, index: int, number: int, view: memoryview) -> None:
        if files.crc32(view) != self.checksums[index][number]:
            start, size = self._cells[index][number]
            names = [
                item.key[0]
                for item in self._layouts[index].items
                if item.offset < start + size and item.offset + item.nbytes > start
            ]
            among = f" (or one of {len(set(names)) - 1} beside it)" if len(set(names)) > 1 else ""
            raise ChecksumError(
                f"the bytes of {names[0] if names else 'a page'!r}{among} changed on disk",
                where=f"{self.path}, bytes {self._starts[index] + start} to {self._starts[index] + start + size}",
                hint=REMOVE,
            )
        self._verified.add((index, number))

    def _look(self) -> tuple[int, ...]:
        if self._fd < 0:
            raise StoreError("the store is closed", where=self.path)
        stat = files.status(self._fd, self.path)
        return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def close(self) -> None:
        """Let go of what it opened itself. Twice does no harm."""
        self._cache.close()
        self._fd = self._direct_fd = -1
        files.close_held(self._held)

    def __del__(self) -> None:
        files.close_held(getattr(self, "_held", []))  # one that an interrupt left without its store


def _around_the_cache(fd: int, held: list[int]) -> int:
    """Open the same file once more with ``O_DIRECT``; -1 where the system cannot."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return -1
    try:
        # by number: another file may have the name by now
        return files.open_held(held, f"/proc/self/fd/{fd}", os.O_RDONLY | flag | _FLAGS)
    except OSError:
        return -1


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without numpy; valid while the tensor lives."""
    if tensor.nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
