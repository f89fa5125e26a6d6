"""Locks on folders: :class:`FolderLock`."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tuckaway.errors import StoreBusy
from tuckaway.files.system import FLAGS, UNSUPPORTED, PathLike, close_held, open_held, remove, typed

try:
    import fcntl

    _HAS_FLOCK = True
except ImportError:  # Windows has no flock: every lock is granted there
    _HAS_FLOCK = False

__all__ = ["FolderLock", "try_lock"]


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock of an open file; ``False``: somebody holds it."""
    if not _HAS_FLOCK:
        return True
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in (*UNSUPPORTED, errno.ENOLCK):  # a file system without locks grants them all
            raise
    return True


class FolderLock:
    """A lock that one holder has alone, or several share. A context manager that holds it alone.

    The system drops the locks of a process that dies, so nothing stale remains to be judged.

    Args:
        path: the lock file; it is there only while held.

    Raises:
        StoreBusy: on entering, somebody else holds it.
        StoreError: the lock file cannot be made.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self._held: list[int] = []

    @property
    def _fd(self) -> int:
        return self._held[-1] if self._held else -1

    def acquire(self, *, shared: bool = False) -> bool:
        """Take the lock, or change how it is held, without waiting; ``False``: others hold it, and this one does not.

        Raises:
            StoreError: the lock file cannot be made.
        """
        held = False
        try:
            with typed("lock it", self.path):
                while self._fd < 0 or not self._is_current():
                    # Between open and lock its last holder may have removed the file: then that lock guards nothing.
                    self._close()
                    open_held(self._held, self.path, os.O_RDWR | os.O_CREAT | FLAGS)
                    if not try_lock(self._fd, shared=shared):
                        return False
                held = try_lock(self._fd, shared=shared)
        finally:
            if not held:
                self._close()
        return held

    def release(self) -> None:
        """Give the lock back, and remove its file if nobody else shares it. Twice does no harm."""
        try:
            with suppress(OSError):  # a lock file that stays is nobody's lock
                if self._fd >= 0 and _HAS_FLOCK and try_lock(self._fd) and self._is_current():
                    remove(self.path)
        finally:
            self._close()

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        close_held(self._held)

    def __del__(self) -> None:
        close_held(self._held)  # one that an interrupt left without its owner

    def __enter__(self) -> FolderLock:
        if not self.acquire():
            hint = "wait for it to end, or choose another folder"
            raise StoreBusy("another process uses this folder", where=self.path.parent, hint=hint)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
