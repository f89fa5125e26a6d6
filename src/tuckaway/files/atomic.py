"""Files that appear whole or not at all: :class:`AtomicFile` and :func:`write_atomically`."""

from __future__ import annotations

import io
import os
import re
import secrets
import socket
import zlib
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tuckaway.errors import StoreError
from tuckaway.files import system
from tuckaway.files.lock import try_lock
from tuckaway.files.system import (
    FLAGS,
    PathLike,
    close,
    names_in,
    remove,
    replace,
    reserve,
    sync_folder,
    typed,
    write_at,
)

__all__ = ["AtomicFile", "reap", "write_atomically"]

_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_TEMP = re.compile(r"\..+\.([0-9a-f]{8})-([0-9]+)-[0-9a-f]{12}\.tmp")

_in_use: set[Path] = set()  # temps of this process


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
        self._file: io.FileIO | None = None
        _in_use.add(self.temp)
        try:
            with typed("create it", self.temp):
                # closes itself: an interrupt between this call and its assignment leaves no descriptor open
                self._file = io.FileIO(self.temp, "x+")
            with typed("lock it", self.temp):
                try_lock(self._fd)
            if nbytes is not None:
                reserve(self._fd, nbytes, self.temp)
        except BaseException:
            with suppress(StoreError):  # what cannot be removed is left to :func:`reap`
                self.discard()
            raise

    @property
    def _fd(self) -> int:
        return -1 if self._file is None else self._file.fileno()

    def write(self, data: Any) -> None:
        """Append a contiguous buffer's bytes to what :meth:`write` wrote before."""
        self._end += self.write_at(self._end, data)

    def write_at(self, offset: int, data: Any) -> int:
        """Write a contiguous buffer's bytes at ``offset`` and return their number."""
        return write_at(self._fd, data, offset, self.temp)

    def finish(self) -> None:
        """Bring every byte to the disk and close; only :meth:`commit` and :meth:`discard` may follow."""
        if self._file is not None:
            system.sync(self._fd, self.temp)
            self._close()

    def commit(self, *, sync: bool = True) -> None:
        """Finish, and give the file its name.

        Args:
            sync: sync the folder too; ``False`` when the caller renames more and syncs once.
        """
        self.finish()
        replace(self.temp, self.path)
        _in_use.discard(self.temp)
        if sync:
            sync_folder(self.path.parent)

    def discard(self) -> None:
        """Close and remove the temp; nothing happens after a commit."""
        _in_use.discard(self.temp)  # what cannot be removed is left to :func:`reap`
        self._close()
        remove(self.temp)

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            close(file)

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
    containers, the lock alone on network file systems. One of this process goes if it could not be removed before.

    Raises:
        StoreError: a temp cannot be removed.
    """
    gone = []
    for name in names_in(folder):
        match = _TEMP.fullmatch(name)
        if match is None or match[1] != _HOST:
            continue
        path, owner = Path(folder) / name, int(match[2])
        abandoned = path not in _in_use if owner == os.getpid() else not psutil.pid_exists(owner)
        if abandoned and _is_unlocked(path) and remove(path):
            gone.append(path)
    return tuple(gone)


def _is_unlocked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | FLAGS)
    except OSError:  # removed by another, or not ours to open
        return False
    try:
        return try_lock(fd)
    finally:
        close(fd)
