"""The only module that writes, locks, syncs, renames and removes.

What is written appears under its name whole or not at all: bytes go to a temp file in the same folder, are synced,
and the temp is renamed over the name. A temp's name holds the host and the process that owns it, so that
:func:`reap` can tell those that a killed process left behind.

Every failure of the system is a :class:`~tuckaway.errors.StoreError` (itself an ``OSError``, with ``errno``); a full
disk or quota is a :class:`~tuckaway.errors.StoreFull`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import socket
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tuckaway.errors import StoreBusy, StoreError, StoreFull

try:
    import fcntl
except ImportError:  # Windows has no flock: every lock is granted there, and temps are told by their process alone
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "AtomicFile",
    "FolderLock",
    "PathLike",
    "make_folder",
    "read_at",
    "reap",
    "remove",
    "remove_folder",
    "replace",
    "require_space",
    "reserve",
    "sync",
    "sync_folder",
    "write_at",
    "write_atomically",
]

PathLike = str | os.PathLike[str]

_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_TEMP = re.compile(r"\..+\.([0-9a-f]{8})-([0-9]+)-[0-9a-f]{12}\.tmp")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)  # Windows translates line ends without O_BINARY
_MAX_CALL = 1 << 30  # bytes a call: Linux moves at most 2 GiB - 4 KiB, macOS refuses more than 2 GiB - 1
_seeking = threading.Lock()  # where there is no pread, position and transfer are two calls


@contextlib.contextmanager
def _typed(action: str, path: object) -> Iterator[None]:
    """Turn an ``OSError`` inside into a ``StoreError`` that names the action and the path."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        kind = StoreFull if error.errno in _FULL else StoreError
        hint = "free some space or choose another folder" if kind is StoreFull else None
        typed = kind(f"cannot {action}: {error.strerror or error}", where=path, hint=hint)
        typed.errno = error.errno
        raise typed from error


# Open files


def write_at(fd: int, data: Any, offset: int, path: object = None) -> int:
    """Write all bytes of a contiguous buffer at ``offset`` and return their number.

    Raises:
        StoreFull: the disk or the quota has no room.
        StoreError: the system refused.
    """
    view = memoryview(data)
    view = view.cast("B") if view.nbytes else memoryview(b"")  # cast refuses a shape with a zero in it
    done = 0
    with _typed("write", path):
        while done < len(view):
            part = view[done : done + _MAX_CALL]
            if hasattr(os, "pwrite"):
                done += os.pwrite(fd, part, offset + done)
            else:
                with _seeking:
                    os.lseek(fd, offset + done, os.SEEK_SET)
                    done += os.write(fd, part)
    return len(view)


def read_at(fd: int, view: memoryview, offset: int, path: object = None) -> int:
    """Fill ``view`` (bytes, writable) from ``offset`` and return the bytes read: fewer only where the file ends.

    Raises:
        StoreError: the system refused.
    """
    done = 0
    with _typed("read", path):
        while done < len(view):
            part = view[done : done + _MAX_CALL]
            if hasattr(os, "preadv"):
                got = os.preadv(fd, [part], offset + done)
            else:
                with _seeking:
                    os.lseek(fd, offset + done, os.SEEK_SET)
                    got = os.readv(fd, [part]) if hasattr(os, "readv") else _read_copy(fd, part)
            if got == 0:
                break
            done += got
    return done


def _read_copy(fd: int, part: memoryview) -> int:
    data = os.read(fd, min(len(part), 1 << 22))
    part[: len(data)] = data
    return len(data)


def reserve(fd: int, nbytes: int, path: PathLike | None = None) -> None:
    """Give an open file its size and its disk blocks now, so that no later write can find the disk full.

    Raises:
        StoreFull: the disk or the quota has no room.
        StoreError: the system refused.
    """
    if nbytes == 0:
        return
    with _typed(f"reserve {nbytes:,} bytes", path):
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(fd, 0, nbytes)
                return
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
        if path is not None:
            require_space(Path(path).parent, nbytes)
        os.ftruncate(fd, nbytes)


def sync(fd: int, path: object = None) -> None:
    """Bring every byte of an open file to the disk.

    Raises:
        StoreError: the disk failed; what was written before must be taken as lost.
    """
    with _typed("sync", path):
        os.fsync(fd)


# Folders and names


def sync_folder(folder: PathLike) -> None:
    """Make the renames and removals in ``folder`` survive a power loss.

    Raises:
        StoreError: the folder cannot be opened or synced.
    """
    if os.name == "nt":  # a folder cannot be opened there; NTFS journals renames by itself
        return
    with _typed("sync the folder", folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:  # some network file systems sync no folders
                raise
        finally:
            os.close(fd)


def replace(source: PathLike, target: PathLike) -> None:
    """Rename ``source`` to ``target``, replacing it; readers see the old file or the new one.

    Raises:
        StoreError: the rename failed.
    """
    with _typed(f"rename it to {os.fspath(target)}", source):
        os.replace(source, target)


def remove(path: PathLike) -> bool:
    """Remove a file and say whether there was one.

    Raises:
        StoreError: it is there and cannot be removed.
    """
    with _typed("remove it", path):
        try:
            os.unlink(path)
        except FileNotFoundError:
            return False
        return True


def make_folder(path: PathLike) -> Path:
    """Make a folder and its parents where missing, and return its path.

    Raises:
        StoreError: it cannot be made, or there is a file.
    """
    with _typed("make the folder", path):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def remove_folder(path: PathLike) -> bool:
    """Remove a folder if it is empty, and say whether it was."""
    try:
        os.rmdir(path)
    except OSError:
        return False
    return True


def require_space(folder: PathLike, nbytes: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        StoreFull: fewer than ``nbytes`` bytes are free below ``folder``.
    """
    with _typed("ask for the free space", folder):
        free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise StoreFull(
            f"{nbytes:,} bytes are to be written and {free:,} are free",
            where=folder,
            hint="free some space or choose another folder",
        )


# Locks


def _try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock of an open file; ``False``: somebody holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in (*_UNSUPPORTED, errno.ENOLCK):  # a file system without locks grants them all
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
        self._fd = -1

    def acquire(self, *, shared: bool = False) -> bool:
        """Take the lock, or change how it is held, without waiting; ``False``: others hold it, and this one does not.

        Raises:
            StoreError: the lock file cannot be made.
        """
        with _typed("lock it", self.path):
            while self._fd < 0 or not self._is_current():
                # Between open and lock its last holder may have removed the file: then that lock guards nothing.
                self._close()
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
                if not _try_lock(self._fd, shared=shared):
                    self._close()
                    return False
            if not _try_lock(self._fd, shared=shared):
                self._close()
                return False
        return True

    def release(self) -> None:
        """Give the lock back, and remove its file if nobody else shares it. Twice does no harm."""
        try:
            if self._fd >= 0 and fcntl is not None and _try_lock(self._fd) and self._is_current():
                remove(self.path)
        finally:
            self._close()

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> FolderLock:
        if not self.acquire():
            hint = "wait for it to end, or choose another folder"
            raise StoreBusy("another process uses this folder", where=self.path.parent, hint=hint)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


# Atomic files


class AtomicFile:
    """A file that appears under its name, whole and synced, when :meth:`commit` is called; never before.

    A context manager that discards what was not committed. Permissions are 0666 less the umask, as for any new file.

    Args:
        path: the name it is to have; its folder must exist.
        nbytes: size to reserve at once; ``None``: it grows as it is written.

    Raises:
        StoreFull: by any method, the disk or the quota has no room.
        StoreError: by any method, the system refused.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "greeting"
        >>> with AtomicFile(path) as file:
        ...     file.write(b"hello")
        ...     file.commit()
        >>> path.read_bytes()
        b'hello'
    """

    def __init__(self, path: PathLike, nbytes: int | None = None) -> None:
        self.path = Path(path)
        stem = os.fsdecode(os.fsencode(self.path.name)[:150])  # names end at 255 bytes; a temp adds up to 50
        self.temp = self.path.with_name(f".{stem}.{_HOST}-{os.getpid()}-{secrets.token_hex(6)}.tmp")
        self._end = 0
        with _typed("create it", self.temp):
            self._fd = os.open(self.temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666)
        try:
            _try_lock(self._fd)
            if nbytes is not None:
                reserve(self._fd, nbytes, self.temp)
        except BaseException:
            self.discard()
            raise

    def write(self, data: Any) -> None:
        """Append a contiguous buffer's bytes to what :meth:`write` wrote before."""
        self._end += self.write_at(self._end, data)

    def write_at(self, offset: int, data: Any) -> int:
        """Write a contiguous buffer's bytes at ``offset`` and return their number."""
        return write_at(self._fd, data, offset, self.temp)

    def finish(self) -> None:
        """Bring every byte to the disk and close; only :meth:`commit` and :meth:`discard` may follow."""
        if self._fd >= 0:
            sync(self._fd, self.temp)
            fd, self._fd = self._fd, -1
            os.close(fd)

    def commit(self, *, sync: bool = True) -> None:
        """Finish, and give the file its name.

        Args:
            sync: sync the folder too; ``False`` when the caller renames more and syncs once.
        """
        self.finish()
        replace(self.temp, self.path)
        if sync:
            sync_folder(self.path.parent)

    def discard(self) -> None:
        """Close and remove the temp; nothing happens after a commit."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
        remove(self.temp)

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def write_atomically(path: PathLike, data: Any) -> None:
    """Write a small file whole: after a crash it has its old bytes or ``data``.

    Raises:
        StoreFull: the disk or the quota has no room.
        StoreError: the system refused.
    """
    with AtomicFile(path) as file:
        file.write(data)
        file.commit()


def reap(folder: PathLike) -> tuple[Path, ...]:
    """Remove the temps that killed processes of this machine left in ``folder``, and return their paths.

    A temp goes only when its process is gone and its lock is free: the process number alone misleads between
    containers, the lock alone on network file systems.

    Raises:
        StoreError: a temp cannot be removed.
    """
    with _typed("list the folder", folder):
        names = sorted(os.listdir(folder))
    gone = []
    for name in names:
        match = _TEMP.fullmatch(name)
        if match is not None and match[1] == _HOST and not psutil.pid_exists(int(match[2])):
            path = Path(folder) / name
            if _is_unlocked(path) and remove(path):
                gone.append(path)
    return tuple(gone)


def _is_unlocked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _FLAGS)
    except OSError:  # removed by another, or not ours to open
        return False
    try:
        return _try_lock(fd)
    finally:
        os.close(fd)
