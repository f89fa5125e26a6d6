"""Which bytes of a file the system has in its page cache: :class:`PageCache`.

A read of what is there runs at memory speed and one past it at the disk's; reading around the cache (``O_DIRECT``)
is right for the second only, because it spares the copy and leaves in the cache what others have there.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from typing import Any

__all__ = ["PageCache"]

_SAMPLES = 8

_FAILED = ctypes.c_void_p(-1).value


class PageCache:
    """Asks about one open file; where the system cannot tell, everything is taken to be there.

    The file is mapped to ask (``mincore``) and never touched through the map, so that a file cut short meanwhile
    harms nobody.

    Args:
        fd: the open file; it may be closed afterwards.
        nbytes: its size.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self._library = _library()
        self._address = 0
        self._nbytes = nbytes
        if self._library is not None and nbytes:
            address = self._library.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
            self._address = 0 if address in (None, _FAILED) else address

    def holds(self, offset: int, nbytes: int) -> bool:
        """Tell whether at least half of these bytes are in the page cache, going by a few of their pages.

        Args:
            offset: multiple of 4096.
            nbytes: size.
        """
        nbytes = min(nbytes, self._nbytes - offset)
        if not self._address or nbytes <= 0 or offset % mmap.PAGESIZE:
            return True
        # each costs a microsecond; to ask for every one would cost a tenth of reading them
        step = max(nbytes // _SAMPLES // mmap.PAGESIZE, 1) * mmap.PAGESIZE
        asked = range(offset, offset + nbytes, step)
        there = ctypes.create_string_buffer(1)
        found = 0
        for at in asked:
            if self._library.mincore(self._address + at, 1, there):
                return True
            found += there.raw == b"\x01"
        return 2 * found >= len(asked)

    def close(self) -> None:
        """Unmap. Twice does no harm."""
        address, self._address = self._address, 0
        if address:
            self._library.munmap(address, self._nbytes)


@functools.cache
def _library() -> Any:
    """The C library with what is used declared; None where it has no ``mincore``."""
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "mincore"):
        return None
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    library.mmap.restype = pointer
    library.mmap.argtypes = [pointer, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    library.munmap.argtypes = [pointer, size]
    library.mincore.argtypes = [pointer, size, ctypes.c_char_p]
    return library
