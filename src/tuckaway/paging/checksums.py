"""CRC-32 of a page in cells, from pieces that come in any order: :func:`crc32`, :class:`PageSums`.

A page is checked cell by cell (:data:`CELL` bytes), by whichever thread read the cell, while it is in that core's
cache. Writers give whole tensors, which do not end where cells do; so the checksums of the parts are put together as
polynomials, and no byte is read back. CRC-32 is what Python itself computes at 1 to 6 GB/s a thread; where ``isal`` or
``zlib_ng`` is installed, the very same value comes at 30. It detects accident, not tampering.
"""

from __future__ import annotations

import functools
import importlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from tuckaway.paging.page import PageLayout

__all__ = ["CELL", "PageSums", "cells", "combine", "crc32"]

CELL = 8 * 2**20
"""Bytes of a cell, the last of a page shorter: what a reading thread takes at once, and one copy carries (53.6 GB/s;
36.9 at 1 MiB). A multiple of 4096."""

_POLYNOMIAL = 0xEDB88320  # reflected, as zlib has it
_ONE = 0x80000000


@functools.cache
def _implementation() -> Callable[[Any, int], int]:
    for package, name in (("isal", "isal_zlib"), ("zlib_ng", "zlib_ng")):
        try:
            found: Callable[[Any, int], int] = importlib.import_module(f"{package}.{name}").crc32
        except ImportError:
            continue
        return found
    return zlib.crc32


def crc32(data: Any, value: int = 0) -> int:
    """Return the CRC-32 of a contiguous buffer, continuing ``value``.

    >>> crc32(b"pages", crc32(b"paged ")) == zlib.crc32(b"paged pages")
    True
    """
    return _implementation()(data, value)


def cells(nbytes: int, cell: int = CELL) -> list[tuple[int, int]]:
    """Return first byte and size of every cell of ``nbytes``.

    >>> cells(10, 4)
    [(0, 4), (4, 4), (8, 2)]
    """
    return [(start, min(cell, nbytes - start)) for start in range(0, nbytes, cell)]


def combine(first: int, second: int, nbytes: int) -> int:
    """Return the CRC-32 of two stretches from theirs; ``nbytes`` is the size of the second.

    >>> combine(zlib.crc32(b"ab"), zlib.crc32(b"cde"), 3) == zlib.crc32(b"abcde")
    True
    """
    return _times(_shift(nbytes), first) ^ second


@functools.lru_cache(4096)
def _shift(nbytes: int) -> int:
    """The polynomial x to the power of ``8 * nbytes``."""
    result, power = _ONE, 0x00800000  # 1, and x^8
    while nbytes:
        if nbytes & 1:
            result = _times(result, power)
        power = _times(power, power)
        nbytes >>= 1
    return result


def _times(a: int, b: int) -> int:
    """Multiply two polynomials over GF(2), modulo CRC-32's."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@functools.lru_cache(256)
def _zeros(nbytes: int) -> int:
    return crc32(bytes(nbytes))


class PageSums:
    """Collects the parts of one page as they are written, and gives the checksums of its cells.

    Bytes between components are zeros.

    Example:
        >>> import torch
        >>> sums = PageSums(PageLayout([(("a", ""), (3,), torch.uint8)]), 256)
        >>> sums.add(2, b"c")
        >>> sums.add(0, b"ab")
        >>> sums.missing(), sums.finish() == [zlib.crc32(b"abc" + bytes(253))]
        (None, True)
    """

    __slots__ = ("_done", "_parts", "cell", "layout")

    def __init__(self, layout: PageLayout, cell: int) -> None:
        self.layout = layout
        self.cell = cell
        self._parts: list[tuple[int, int, int]] = []
        self._done = [0] * len(layout.items)

    def add(self, offset: int, data: Any) -> None:
        """Take a contiguous buffer's bytes, which lie at ``offset`` of the page within one component.

        Raises:
            ValueError: they do not lie within one component.
        """
        view = memoryview(data)
        self._done[self.item_at(offset, view.nbytes)] += view.nbytes
        at = 0
        while at < view.nbytes:
            end = min(view.nbytes, at + self.cell - (offset + at) % self.cell)
            self._parts.append((offset + at, end - at, crc32(view[at:end])))
            at = end

    def item_at(self, offset: int, nbytes: int) -> int:
        """Return the number of the component that has these bytes.

        Raises:
            ValueError: none has.
        """
        for number, item in enumerate(self.layout.items):
            if item.offset <= offset and offset + nbytes <= item.offset + item.nbytes:
                return number
        raise ValueError(f"no component of the page has bytes {offset} to {offset + nbytes}")

    def missing(self) -> tuple[str, int, int] | None:
        """Return a component that was not written once and whole: name, bytes written, its bytes."""
        for item, done in zip(self.layout.items, self._done, strict=True):
            if done != item.nbytes:
                return item.key[0], done, item.nbytes
        return None

    def finish(self) -> list[int]:
        """Return the checksum of every cell of the page."""
        ranges = cells(self.layout.nbytes, self.cell)
        values = [0] * len(ranges)
        ends = [start for start, _ in ranges]
        for offset, nbytes, value in sorted(self._parts):
            number = offset // self.cell
            self._pad(values, ends, number, offset)
            values[number] = combine(values[number], value, nbytes)
            ends[number] = offset + nbytes
        for number, (start, size) in enumerate(ranges):
            self._pad(values, ends, number, start + size)
        return values

    @staticmethod
    def _pad(values: list[int], ends: Sequence[int], number: int, to: int) -> None:
        gap = to - ends[number]
        if gap > 0:
            values[number] = combine(values[number], _zeros(gap), gap)
