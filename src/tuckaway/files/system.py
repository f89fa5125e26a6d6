"""Calls of the system that write, sync, rename and remove, each with a typed error."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuckaway.errors import StoreError, StoreFull

__all__ = [
    "FLAGS",
    "UNSUPPORTED",
    "PathLike",
    "close",
    "close_held",
    "exists",
    "forget",
    "make_folder",
    "names_in",
    "open_held",
    "read_at",
    "remove",
    "remove_folder",
    "replace",
    "require_space",
    "reserve",
    "status",
    "sync",
    "sync_folder",
    "typed",
    "write_at",
]

PathLike = str | os.PathLike[str]

FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
"""Added whenever a file is opened: Windows translates line ends without ``O_BINARY``."""

UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""What file systems answer that cannot do a thing, as opposed to failing at it."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_CALL = 1 << 30  # bytes a call: Linux moves at most 2 GiB - 4 KiB, macOS refuses more than 2 GiB - 1
_seeking = threading.Lock()  # where there is no pread, position and transfer are two calls


@contextlib.contextmanager
def typed(action: str, path: object) -> Iterator[None]:
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


def write_at(fd: int, data: Any, offset: int, path: object = None) -> int:
    """Write all bytes of a contiguous buffer at ``offset`` and return their number.

    Raises:
        StoreFull: the disk or the quota has no room.
        StoreError: the system refused.
    """
    view = memoryview(data)
    view = view.cast("B") if view.nbytes else memoryview(b"")  # cast refuses a shape with a zero in it
    done = 0
    with typed("write", path):
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
    with typed("read", path):
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
    with typed(f"reserve {nbytes:,} bytes", path):
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(fd, 0, nbytes)
                return
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
        if path is not None:
            require_space(Path(path).parent, nbytes)
        os.ftruncate(fd, nbytes)


def sync(fd: int, path: object = None) -> None:
    """Bring every byte of an open file to the disk.

    Raises:
        StoreError: the disk failed; what was written before must be taken as lost.
    """
    with typed("sync", path):
        os.fsync(fd)


def sync_folder(folder: PathLike) -> None:
    """Make the renames and removals in ``folder`` survive a power loss.

    Raises:
        StoreError: the folder cannot be opened or synced.
    """
    if os.name == "nt":  # a folder cannot be opened there; NTFS journals renames by itself
        return
    with typed("sync the folder", folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | FLAGS)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in UNSUPPORTED:  # some network file systems sync no folders
                raise
        finally:
            os.close(fd)


def forget(path: PathLike) -> None:
    """Take a file that was synced out of the page cache, where the system can, so that it is read from the disk again.

    Raises:
        StoreError: it cannot be opened.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    with typed("open it", path):
        fd = os.open(path, os.O_RDONLY | FLAGS)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def replace(source: PathLike, target: PathLike) -> None:
    """Rename ``source`` to ``target``, replacing it; readers see the old file or the new one.

    Raises:
        StoreError: the rename failed.
    """
    with typed(f"rename it to {os.fspath(target)}", source):
        os.replace(source, target)


def remove(path: PathLike) -> bool:
    """Remove a file and say whether there was one.

    Raises:
        StoreError: it is there and cannot be removed.
    """
    with typed("remove it", path):
        try:
            os.unlink(path)
        except FileNotFoundError:
            return False
        return True


def close(opened: int | io.FileIO) -> None:
    """Close a file; it is closed even where the system reports a failure.

    That can only concern writes that were not synced, and whoever needs his writes has synced them.
    """
    with contextlib.suppress(OSError):
        if isinstance(opened, int):
            os.close(opened)
        else:
            opened.close()


def open_held(held: list[int], path: PathLike, flags: int, mode: int = 0o666) -> int:
    """Open a file, and put its number into ``held`` before Ctrl-C can come between.

    An interrupt right behind ``os.open`` loses the number that it returned. Here the list takes it while the
    interpreter, which looks for signals between two calls of Python, is inside one.

    Raises:
        OSError: the system refused.
    """
    held.extend(map(os.open, (path,), (flags,), (mode,)))
    return held[-1]


def close_held(held: list[int]) -> None:
    """Close what the list holds, the last first. Interrupted, it leaves in the list exactly what is open still."""
    while held:
        with contextlib.suppress(OSError, IndexError):
            for _ in map(
                os.close, iter(held.pop, None)
            ):  # each is popped and closed within one step of the loop
                pass


def exists(path: PathLike) -> bool:
    """Whether there is a file or folder.

    Raises:
        StoreError: the system does not say.
    """
    with typed("look for it", path):
        return Path(path).exists()


def status(fd: int, path: object = None) -> os.stat_result:
    """Return what the system knows of an open file.

    Raises:
        StoreError: it does not say.
    """
    with typed("look at it", path):
        return os.fstat(fd)


def names_in(folder: PathLike) -> list[str]:
    """Return the names in a folder, in order.

    Raises:
        StoreError: it cannot be listed.
    """
    with typed("list the folder", folder):
        return sorted(os.listdir(folder))


def make_folder(path: PathLike) -> Path:
    """Make a folder and its parents where missing, and return its path.

    Raises:
        StoreError: it cannot be made, or there is a file.
    """
    with typed("make the folder", path):
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
    with typed("ask for the free space", folder):
        free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise StoreFull(
            f"{nbytes:,} bytes are to be written and {free:,} are free",
            where=folder,
            hint="free some space or choose another folder",
        )
