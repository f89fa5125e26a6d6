"""CRC-32 of a page in cells, from pieces that come in any order: :class:`PageSums`.

A page is checked cell by cell (at most :data:`CELL` bytes), by whichever thread read the cell, while it is in that
core's cache. Writers give whole tensors, which do not end where cells do; so the checksums of the parts are put
together as polynomials, and no byte is read back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from tuckaway import files
from tuckaway.paging.page import EXTENT, PageLayout, aligned

__all__ = ["CELL", "PageSums", "cell_bytes", "cells"]

CELL = 8 * 2**20
"""Most bytes of a cell: what a reading thread takes at once. A multiple of 4096."""
_LEAST = 2**20
_EACH = 16
"""Cells of the largest page: the 14 threads that read at the most all have one, also of a page of 31 MB (GPT-2 XL)."""


def cell_bytes(layouts: Sequence[PageLayout], most: int = CELL) -> int:
    """Return the size of the cells of these pages; the last of a page is shorter.

    Example:
        >>> import torch
        >>> [cell_bytes([PageLayout([(("a", ""), (n * 2**20,), torch.uint8)])]) / 2**20 for n in (2, 40, 500)]
        [1.0, 2.5, 8.0]
    """
    share = -(-max((layout.nbytes for layout in layouts), default=0) // _EACH)
    return min(most, max(_LEAST, aligned(share, EXTENT)))


def cells(nbytes: int, cell: int = CELL) -> list[tuple[int, int]]:
    """Return first byte and size of every cell of ``nbytes``.

    >>> cells(10, 4)
    [(0, 4), (4, 4), (8, 2)]
    """
    return [(start, min(cell, nbytes - start)) for start in range(0, nbytes, cell)]


@functools.lru_cache(256)
def _zeros(nbytes: int) -> int:
    return files.crc32(bytes(nbytes))


class PageSums:
    """Collects the parts of one page as they are written, and gives the checksums of its cells.

    Bytes between components are zeros.

    Example:
        >>> import torch, zlib
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
            self._parts.append((offset + at, end - at, files.crc32(view[at:end])))
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
            values[number] = files.crc32_combine(values[number], value, nbytes)
            ends[number] = offset + nbytes
        for number, (start, size) in enumerate(ranges):
            self._pad(values, ends, number, start + size)
        return values

    @staticmethod
    def _pad(values: list[int], ends: Sequence[int], number: int, to: int) -> None:
        gap = to - ends[number]
        if gap > 0:
            values[number] = files.crc32_combine(values[number], _zeros(gap), gap)
