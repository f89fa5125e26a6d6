"""Pages on disk: one file of aligned extents and a manifest that says what they are.

::

    offload folder/
        pages.bin        every page at a multiple of 4096 bytes, its tensors where the PageLayout has them
        manifest.json    version, fingerprint, sizes, CRC-32 of every cell and of itself; written last, atomically
        tuckaway.lock    held while a process uses the folder: alone while writing, shared while reading

A store without a manifest is what a crash left behind: it is written anew. A store of the same fingerprint is used
as it is, a store of another one, or of another version of tuckaway, is never touched.

The checksums cover a page up to its ``nbytes``, with the zeros between components. The rest of its last 4096 bytes is
nobody's: no component is made of it, whatever is there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from tuckaway import files
from tuckaway.checkpoint.entry import open_regular
from tuckaway.errors import CheckpointError, StoreBusy, StoreCorrupt, StoreError
from tuckaway.paging.checksums import CELL, PageSums, cell_bytes
from tuckaway.paging.fill import Fill
from tuckaway.paging.manifest import (
    ANOTHER,
    MANIFEST,
    REMOVE,
    Manifest,
    fingerprint_of,
    read_manifest,
    refuse_foreign,
)
from tuckaway.paging.page import PageItem, PageLayout
from tuckaway.paging.reading import CellReader, byte_view
from tuckaway.paging.threads import Threads, reading_thread_count

__all__ = ["Store"]

_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_DATA, _LOCK = "pages.bin", "tuckaway.lock"


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
        self._made_folder = False
        self._lock = lock
        self._held: list[int] = []
        """What is open, whatever else says so."""
        self._fd = -1
        self._starts: list[int] = []
        end = 0
        for layout in self.layouts:
            self._starts.append(end)
            end += layout.extent
        self.nbytes = end
        self._cell = CELL
        self._sums: list[PageSums] = []
        self._reader: CellReader | None = None
        self._guard = threading.Lock()
        self._write_fd = -1
        self._pid = os.getpid()
        self._pool: Threads | None = None

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
            StoreStale: the folder holds another model's pages, another version's, or accelerate's.
            StoreFull: the pages do not fit on the disk.
            StoreCorrupt: the store is this one, and damaged.
            StoreError: the folder cannot be written to.
        """
        made = not files.exists(folder)
        path = files.make_folder(folder)
        lock = files.FolderLock(path / _LOCK)
        store = cls(path, layouts, fingerprint_of(layouts, identity), lock)
        store._made_folder = made
        try:
            alone = lock.acquire(shared=False)
            if not alone and not lock.acquire(shared=True):
                raise StoreBusy("another process is writing to the offload folder", where=path, hint=ANOTHER)
            manifest = read_manifest(path)
            if manifest is not None and manifest.fingerprint == store.fingerprint:
                store._reopen(manifest)
                lock.acquire(shared=True)
            elif not alone:
                raise StoreBusy(
                    "another process uses the offload folder for other weights", where=path, hint=ANOTHER
                )
            else:
                refuse_foreign(path, manifest)
                files.reap(path)
                store._begin()
        except BaseException:
            store.close()
            store._remove_made_folder()
            raise
        return store

    def _reopen(self, manifest: Manifest) -> None:
        if (manifest.nbytes, manifest.starts) != (self.nbytes, tuple(self._starts)):
            raise StoreCorrupt(
                "the manifest describes other pages", where=self.folder / MANIFEST, hint=REMOVE
            )
        try:
            self._fd = open_regular(self.path, self._held)
        except CheckpointError as error:
            raise StoreCorrupt(
                f"cannot open the pages: {error.what}", where=self.path, hint=REMOVE
            ) from error
        size = files.status(self._fd, self.path).st_size
        if size != self.nbytes:
            raise StoreCorrupt(f"{size} bytes instead of {self.nbytes}", where=self.path, hint=REMOVE)
        self._reader = self._readable([list(page) for page in manifest.checksums], manifest.cell)
        self.reusable = True

    def _readable(self, checksums: list[list[int]], cell: int) -> CellReader:
        return CellReader(self.path, self._fd, self.layouts, self._starts, checksums, cell)

    def _begin(self) -> None:
        files.remove(self.folder / MANIFEST)
        files.remove(self.path)
        try:
            self._fd = files.open_held(self._held, self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS)
        except OSError as error:
            refused = StoreError(f"cannot write the pages: {error.strerror}", where=self.path)
            refused.errno = error.errno
            raise refused from error
        try:
            files.reserve(self._fd, self.nbytes, self.path)
        except BaseException:
            self.abort()
            raise
        self._cell = cell_bytes(self.layouts, CELL)
        self._sums = [PageSums(layout, self._cell) for layout in self.layouts]

    # Writing

    def write(self, index: int, offset: int, tensor: torch.Tensor) -> None:
        """Write a CPU tensor, or a piece of one, at a byte offset of page ``index``.

        Pieces of a component may come in any order.

        Raises:
            StoreError: the store is committed, or the disk failed.
            ValueError: the bytes do not lie within one component of the page.
        """
        if self.reusable:
            raise StoreError("a committed store cannot be written to", where=self.path)
        self._sums[index].item_at(offset, tensor.nbytes)
        if tensor.nbytes:
            data = byte_view(source := tensor.contiguous())
            files.write_at(self._fd, data, self._starts[index] + offset, self.path)
            self._sums[index].add(offset, data)
            del source

    def commit(self) -> None:
        """Make the store valid: all bytes and then the manifest on disk. Twice does no harm.

        Raises:
            StoreError: a component was not written, or the disk failed.
        """
        if self.reusable:
            return
        for sums in self._sums:
            if missing := sums.missing():
                name, done, nbytes = missing
                raise StoreError(f"{name!r} was not written: {done} of {nbytes} bytes", where=self.path)
        checksums = [sums.finish() for sums in self._sums]
        manifest = Manifest(
            self.fingerprint,
            self.nbytes,
            tuple(self._starts),
            self._cell,
            tuple(tuple(page) for page in checksums),
        )
        files.sync(self._fd, self.path)
        files.sync_folder(
            self.folder
        )  # before the manifest: after a power loss it must not be there without the pages
        files.write_atomically(self.folder / MANIFEST, manifest.text())
        self._reader = self._readable(checksums, self._cell)
        self.reusable = True
        self._sums.clear()
        self._lock.acquire(shared=True)

    def rewrite(self, index: int, item: PageItem, tensor: torch.Tensor) -> None:
        """Overwrite one component of a committed store. It has no manifest from then on: nobody opens it again.

        Raises:
            StoreBusy: somebody else uses the store.
            StoreError: the disk failed.
        """
        reader = self.reader
        with self._guard:
            if self._write_fd < 0:
                self._open_again()
            data = byte_view(source := tensor.contiguous())
            files.write_at(self._write_fd, data, self._starts[index] + item.offset, self.path)
            reader.changed(index, item.offset, item.nbytes)
            del source

    def _open_again(self) -> None:
        """Open the pages for writing, beside the descriptor that threads may be reading through."""
        if not self._lock.acquire(shared=False):
            self._lock.acquire(shared=True)
            raise StoreBusy("others use the store that is to be changed", where=self.folder, hint=ANOTHER)
        fd = files.open_held(self._held, self.path, os.O_RDWR | _FLAGS)
        if not os.path.samestat(os.fstat(fd), os.fstat(self._fd)):
            files.close(self._held.pop())
            raise StoreCorrupt("the file was replaced by another", where=self.path, hint=REMOVE)
        self._write_fd = fd
        files.remove(self.folder / MANIFEST)

    # Reading

    @property
    def reader(self) -> CellReader:
        """Reads the pages cell by cell.

        Raises:
            StoreError: the store is closed, or not committed.
        """
        if self._reader is None:
            state = "closed" if self._fd < 0 else "not committed"
            raise StoreError(f"the store is {state}", where=self.path)
        return self._reader

    def read(self, index: int, out: torch.Tensor) -> None:
        """Read page ``index`` into a 1-D uint8 CPU tensor; its checksums are compared the first time.

        Raises:
            StoreCorrupt: the file is shorter than it was.
            ChecksumError: bytes changed on disk.
            StoreError: the disk failed.
        """
        size, reader = self.layouts[index].nbytes, self.reader
        if out.numel() < size:
            raise ValueError(f"a page of {size} bytes does not fit into {out.numel()}")
        reader.refresh()
        ranges = reader.cells(index)
        around = reader.goes_around(index)
        if len(ranges) == 1:
            reader.read(index, 0, out[:size], around=around)
        elif ranges:

            def read(number: int) -> None:
                if not fill.wanted:
                    return
                start, nbytes = ranges[number]
                reader.read(index, number, out[start : start + nbytes], around=around)

            fill = Fill(self.submit)
            try:
                fill.begin(partial(read, n) for n in range(len(ranges)))
                fill.result()
            finally:
                fill.cancel()  # after an interrupt nobody wants the rest

    def read_item(self, index: int, item: PageItem) -> torch.Tensor:
        """Read one component of a page into memory of its own; what was not checked yet is."""
        out = torch.empty(item.nbytes, dtype=torch.uint8)
        if self.reusable:
            self.reader.read_range(index, item.offset, out)
        elif item.nbytes:
            files.read_at(self._fd, byte_view(out), self._starts[index] + item.offset, self.path)
        return out.view(item.dtype).view(item.shape)

    def submit(self, *calls: Callable[[], object]) -> None:
        """Have the threads that read make calls, in this order.

        Raises:
            RuntimeError: the store is closed.
        """
        if self._fd < 0:
            raise RuntimeError("the threads that read were ended")
        self.threads().submit(*calls)

    def threads(self) -> Threads:
        """The threads that read; made when first asked for."""
        with self._guard:
            if self._pool is None:
                self._pool = Threads(reading_thread_count())
            return self._pool

    # Ending

    def close(self) -> None:
        """Close the files and release the lock; the store stays, unless it was rewritten. Twice does no harm."""
        owner = self._pid == os.getpid()
        if self._pool is not None and owner:
            self._pool.close()
        self._pool = None
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._fd = -1
        files.close_held(self._held)
        if owner:  # a forked process leaves the file and the lock to the one that opened them
            if self._write_fd >= 0:
                files.remove(self.path)
            self._write_fd = -1
            self._lock.release()

    def __del__(self) -> None:
        if getattr(self, "_held", None):
            self.close()

    def abort(self) -> None:
        """Close, and remove what was written if it was never committed."""
        try:
            if not self.reusable and self._fd >= 0 and self._pid == os.getpid():
                files.remove(self.folder / MANIFEST)  # a commit may have failed behind it
                files.remove(self.path)
        finally:
            self.close()
            self._remove_made_folder()

    def _remove_made_folder(self) -> None:
        if self._made_folder and not self.reusable:
            files.remove_folder(self.folder)  # if it is empty
