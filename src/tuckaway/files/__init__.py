"""The only package that writes, locks, syncs, renames and removes.

What is written appears under its name whole or not at all: bytes go to a temp file in the same folder, are synced,
and the temp is renamed over the name. A temp's name holds the host and the process that owns it, so that
:func:`reap` can tell those that a killed process left behind.

Every failure of the system is a :class:`~tuckaway.errors.StoreError` (itself an ``OSError``, with ``errno``); a full
disk or quota is a :class:`~tuckaway.errors.StoreFull`.
"""

from tuckaway.files.atomic import AtomicFile, reap, write_atomically
from tuckaway.files.checksum import crc32, crc32_combine, is_fast
from tuckaway.files.lock import FolderLock
from tuckaway.files.system import (
    PathLike,
    close,
    close_held,
    exists,
    forget,
    make_folder,
    names_in,
    open_held,
    read_at,
    remove,
    remove_folder,
    replace,
    require_space,
    reserve,
    status,
    sync,
    sync_folder,
    write_at,
)

__all__ = [
    "AtomicFile",
    "FolderLock",
    "PathLike",
    "close",
    "close_held",
    "crc32",
    "crc32_combine",
    "exists",
    "forget",
    "is_fast",
    "make_folder",
    "names_in",
    "open_held",
    "read_at",
    "reap",
    "remove",
    "remove_folder",
    "replace",
    "require_space",
    "reserve",
    "status",
    "sync",
    "sync_folder",
    "write_at",
    "write_atomically",
]
