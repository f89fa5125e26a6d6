"""How much of a file the system holds in its page cache, and how to make it forget: what "warm" and "cold" mean."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

from tuckaway.errors import ConfigError

__all__ = ["cached_share", "evict"]


def cached_share(files: Iterable[Path]) -> float | None:
    """Return the part of the files' bytes that is in the page cache, 0.0 to 1.0; ``None`` where it cannot be known."""
    cached = total = 0
    for path in files:
        found = _resident_pages(path)
        if found is None:
            return None
        cached, total = cached + found[0], total + found[1]
    return cached / total if total else None


def evict(files: Iterable[Path]) -> None:
    """Drop the files from the page cache; what was written and not yet synced stays.

    Raises:
        ConfigError: the system has no way to.
    """
    if not hasattr(os, "posix_fadvise"):
        raise ConfigError("this system cannot drop files from its page cache", hint="leave out --cold")
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resident_pages(path: Path) -> tuple[int, int] | None:
    """Return how many pages of a file are in memory, and how many it has, as Linux's ``mincore`` says."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    if not size:
        return 0, 0
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, OSError, TypeError):  # no such function, or no C library to ask
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as mapped:
        vector = (ctypes.c_ubyte * pages)()
        view = ctypes.c_char.from_buffer(mapped)
        try:
            failed = mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), vector)
        finally:
            del view  # a map with a view cannot be closed
    return None if failed else (sum(page & 1 for page in vector), pages)
