"""Pages on disk: one file of aligned extents and a manifest that says what they are.

::

    offload folder/
        pages.bin        every page at a multiple of 4096 bytes, its tensors where the PageLayout has them
        manifest.json    version, fingerprint, size, checksum of every component; written last, atomically
        tuckaway.lock    held while a process uses the folder: alone while writing, shared while reading

A store without a manifest is what a crash left behind: it is written anew. A store of the same fingerprint is used
as it is, a store of another one is never touched.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tuckaway import files
from tuckaway.errors import ChecksumError, StoreBusy, StoreCorrupt, StoreError
from tuckaway.paging.manifest import (
    ANOTHER,
    MANIFEST,
    REMOVE,
    VERSION,
    fingerprint_of,
    read_manifest,
    refuse_foreign,
)
from tuckaway.paging.page import PageItem, PageLayout

__all__ = ["Store"]

logger = logging.getLogger("tuckaway")

_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_DATA, _LOCK = "pages.bin", "tuckaway.lock"
_CHUNK = 8 * 2**20
"""Bytes a thread reads at once: a page cache gives 6 GB/s to one thread and 19 to four."""
_THREADS = 4


class Store:
    """The open store of one model. Made by :meth:`open_or_create`.

    Attributes:
        reusable: every page is there already; nothing is to be written.
        nbytes: size of the data file.
    """

    def __init__(
        self, folder: Path, layouts: Sequence[PageLayout], fingerprint: str, lock: files.FolderLock
    ) -> None:
        self.folder = folder
        self.path = folder / _DATA
        self.layouts = tuple(layouts)
        self.fingerprint = fingerprint
        self.reusable = False
        self._lock = lock
        self._fd = -1
        self._starts: list[int] = []
        end = 0
        for layout in self.layouts:
            self._starts.append(end)
            end += layout.extent
        self.nbytes = end
        self._written: dict[tuple[int, int], tuple[int, int | None]] = {}
        self._checksums: list[list[int]] = []
        self._verified: set[int] = set()
        self._identity: tuple[int, ...] = ()
        self._guard = threading.Lock()
        self._rewritten = False
        self._pool: ThreadPoolExecutor | None = None

    # Opening

    @classmethod
    def open_or_create(
        cls, folder: str | os.PathLike[str], layouts: Sequence[PageLayout], identity: str = ""
    ) -> Store:
        """Open the folder's store if it is this one, or begin a new one.

        Args:
            folder: made if it does not exist.
            layouts: one a page.
            identity: what tells these weights from all others (checkpoint, formats). Empty: nothing does, so the
                store is not used again.

        Raises:
            StoreBusy: another process uses the folder.
            StoreStale: the folder holds another model's pages, or accelerate's.
            StoreFull: the pages do not fit on the disk.
            StoreCorrupt: the store is this one, and damaged.
            StoreError: the folder cannot be written to.
        """
        path = files.make_folder(folder)
        lock = files.FolderLock(path / _LOCK)
        store = cls(path, layouts, fingerprint_of(layouts, identity), lock)
        try:
            alone = lock.acquire(shared=False)
            if not alone and not lock.acquire(shared=True):
                raise StoreBusy("another process is writing to the offload folder", where=path, hint=ANOTHER)
            manifest = read_manifest(path)
            if manifest is not None and manifest.get("fingerprint") == store.fingerprint:
                store._reopen(manifest)
                lock.acquire(shared=True)
            elif not alone:
                raise StoreBusy(
                    "another process uses the offload folder for other weights", where=path, hint=ANOTHER
                )
            else:
                refuse_foreign(path, manifest)
                store._begin()
        except BaseException:
            store.close()
            raise
        return store

    def _reopen(self, manifest: dict[str, Any]) -> None:
        try:
            self._checksums = [[int(c) for c in page] for page in manifest["checksums"]]
            sound = int(manifest["nbytes"]) == self.nbytes and [len(c) for c in self._checksums] == [
                len(layout.items) for layout in self.layouts
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise StoreCorrupt(
                f"unreadable manifest: {error!r}", where=self.folder / MANIFEST, hint=REMOVE
            ) from error
        if not sound:
            raise StoreCorrupt(
                "the manifest describes other pages", where=self.folder / MANIFEST, hint=REMOVE
            )
        try:
            self._fd = os.open(self.path, os.O_RDONLY | _FLAGS)
        except OSError as error:
            raise StoreCorrupt(
                f"cannot open the pages: {error.strerror}", where=self.path, hint=REMOVE
            ) from error
        size = os.fstat(self._fd).st_size
        if size != self.nbytes:
            raise StoreCorrupt(f"{size} bytes instead of {self.nbytes}", where=self.path, hint=REMOVE)
        self._identity = self._look()
        self.reusable = True

    def _begin(self) -> None:
        files.remove(self.folder / MANIFEST)
        files.remove(self.path)
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666)
        except OSError as error:
            raise StoreError(f"cannot write the pages: {error.strerror}", where=self.path) from error
        try:
            files.reserve(self._fd, self.nbytes, self.path)
        except BaseException:
            self.abort()
            raise

    # Writing

    def write(self, index: int, offset: int, tensor: torch.Tensor) -> None:
        """Write a CPU tensor, or a piece of one, at a byte offset of page ``index``.

        Pieces of a component may come in any order; in order from its start is cheapest.

        Raises:
            StoreError: the store is committed, or the disk failed.
            ValueError: the bytes do not lie within one component of the page.
        """
        if self.reusable:
            raise StoreError("a committed store cannot be written to", where=self.path)
        nbytes = tensor.nbytes
        number = self._item_at(index, offset, nbytes)
        if nbytes == 0:
            return
        source = tensor.contiguous()
        data = _bytes(source)
        files.write_at(self._fd, data, self._starts[index] + offset, self.path)
        item = self.layouts[index].items[number]
        done, checksum = self._written.get((index, number), (0, 0))
        in_order = checksum is not None and offset == item.offset + done
        self._written[index, number] = (done + nbytes, zlib.crc32(data, checksum or 0) if in_order else None)

    def commit(self) -> None:
        """Make the store valid: all bytes and then the manifest on disk. Twice does no harm.

        Raises:
            StoreError: a component was not written, or the disk failed.
        """
        if self.reusable:
            return
        checksums: list[list[int]] = []
        for index, layout in enumerate(self.layouts):
            row = []
            for number, item in enumerate(layout.items):
                done, checksum = self._written.get((index, number), (0, 0))
                if done != item.nbytes:
                    raise StoreError(
                        f"{item.key[0]!r} was not written: {done} of {item.nbytes} bytes", where=self.path
                    )
                row.append(self._read_checksum(index, item) if checksum is None else checksum)
            checksums.append(row)
        content = {
            "about": "tuckaway pages",
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "nbytes": self.nbytes,
            "starts": self._starts,
            "checksum": "crc32",
            "checksums": checksums,
        }
        files.sync(self._fd, self.path)
        files.write_atomically(self.folder / MANIFEST, json.dumps(content).encode())
        self._checksums = checksums
        self._identity = self._look()
        self.reusable = True
        self._written.clear()
        self._lock.acquire(shared=True)

    def rewrite(self, index: int, item: PageItem, tensor: torch.Tensor) -> None:
        """Overwrite one component of a committed store. It has no manifest from then on: nobody opens it again.

        Raises:
            StoreBusy: somebody else uses the store.
            StoreError: the disk failed.
        """
        if not self._rewritten:
            if not self._lock.acquire(shared=False):
                self._lock.acquire(shared=True)
                raise StoreBusy("others use the store that is to be changed", where=self.folder, hint=ANOTHER)
            fd = os.open(self.path, os.O_RDWR | _FLAGS)
            if not os.path.samestat(os.fstat(fd), os.fstat(self._fd)):
                os.close(fd)
                raise StoreCorrupt("the file was replaced by another", where=self.path, hint=REMOVE)
            files.remove(self.folder / MANIFEST)
            os.close(self._fd)
            self._fd, self._rewritten = fd, True
        data = _bytes(source := tensor.contiguous())
        with self._guard:
            files.write_at(self._fd, data, self._starts[index] + item.offset, self.path)
            self._checksums[index][self.layouts[index].items.index(item)] = zlib.crc32(data)
            self._identity = self._look()
        del source

    # Reading

    def read(self, index: int, out: torch.Tensor) -> None:
        """Read page ``index`` into a 1-D uint8 CPU tensor; its checksums are compared the first time.

        Raises:
            StoreCorrupt: the file is shorter than it was.
            ChecksumError: bytes changed on disk.
            StoreError: the disk failed.
        """
        size = self.layouts[index].nbytes
        view = _bytes(out)[:size]
        if len(view) < size:
            raise ValueError(f"a page of {size} bytes does not fit into {out.numel()}")
        start = self._starts[index]
        if size <= _CHUNK:
            self._read_range(view, start)
        else:
            chunks = range(0, size, _CHUNK)
            list(self._threads().map(lambda at: self._read_range(view[at : at + _CHUNK], start + at), chunks))
        now = self._look()
        with self._guard:
            if now != self._identity:
                logger.debug("%s changed since it was opened: checking it again", self.path)
                self._verified.clear()
                self._identity = now
            known = index in self._verified
        if not known:
            for number, item in enumerate(self.layouts[index].items):
                self._check(index, number, view[item.offset : item.offset + item.nbytes])
            with self._guard:
                self._verified.add(index)

    def read_item(self, index: int, item: PageItem) -> torch.Tensor:
        """Read one component of a page into memory of its own, and compare its checksum."""
        out = torch.empty(item.nbytes, dtype=torch.uint8)
        view = _bytes(out)
        self._read_range(view, self._starts[index] + item.offset)
        if self.reusable:
            self._check(index, self.layouts[index].items.index(item), view)
        return out.view(item.dtype).view(item.shape)

    def _read_range(self, view: memoryview, offset: int) -> None:
        if self._fd < 0:
            raise StoreError("the store is closed", where=self.path)
        got = files.read_at(self._fd, view, offset, self.path)
        if got != len(view):
            raise StoreCorrupt(
                "the file ends too early", where=f"{self.path}, byte {offset + got}", hint=REMOVE
            )

    def _read_checksum(self, index: int, item: PageItem) -> int:
        out = torch.empty(item.nbytes, dtype=torch.uint8)
        self._read_range(_bytes(out), self._starts[index] + item.offset)
        return zlib.crc32(_bytes(out))

    def _check(self, index: int, number: int, view: memoryview) -> None:
        if zlib.crc32(view) != self._checksums[index][number]:
            item = self.layouts[index].items[number]
            raise ChecksumError(
                f"the bytes of {item.key[0]!r} changed on disk",
                where=f"{self.path}, byte {self._starts[index] + item.offset}",
                hint=REMOVE,
            )

    def _item_at(self, index: int, offset: int, nbytes: int) -> int:
        for number, item in enumerate(self.layouts[index].items):
            if item.offset <= offset and offset + nbytes <= item.offset + item.nbytes:
                return number
        raise ValueError(f"no component of page {index} has bytes {offset} to {offset + nbytes}")

    def _look(self) -> tuple[int, ...]:
        stat = os.fstat(self._fd)
        return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def _threads(self) -> ThreadPoolExecutor:
        with self._guard:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="tuckaway-read")
            return self._pool

    # Ending

    def close(self) -> None:
        """Close the files and release the lock; the store stays, unless it was rewritten. Twice does no harm."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self._rewritten:
                files.remove(self.path)
        self._lock.release()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def abort(self) -> None:
        """Close, and remove what was written if it was never committed."""
        if not self.reusable and self._fd >= 0:
            files.remove(self.path)
        self.close()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without numpy; valid while the tensor lives."""
    if tensor.nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
