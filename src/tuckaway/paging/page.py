"""Where every byte of a page lies: :class:`PageLayout`.

A page holds all tensors of an offloaded block, quantized ones as their components, one after the other. The same
bytes are the page in the arena, in the store and in a slot, so bringing a page in is one copy, and the tensors are
views of wherever it went.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from tuckaway.formats import Components, Shape
from tuckaway.tensor import TensorSpec

__all__ = ["ALIGNMENT", "EXTENT", "Key", "PageItem", "PageLayout", "aligned"]

ALIGNMENT = 256
"""Bytes that every component starts on a multiple of: a cache line pair of a GPU, and any vector load."""

EXTENT = 4096
"""Bytes that every page starts on a multiple of, on disk and in memory: what direct reads and pinning want."""

Key = tuple[str, str]
"""Name of a tensor, and of one of its components (``""`` for a plain tensor)."""


def aligned(size: int, alignment: int = ALIGNMENT) -> int:
    """Round ``size`` up to a multiple of ``alignment``.

    >>> aligned(1), aligned(256), aligned(0)
    (256, 256, 0)
    """
    return -(-size // alignment) * alignment


@dataclass(frozen=True)
class PageItem:
    """One component in a page; ``offset`` and ``nbytes`` are bytes."""

    key: Key
    shape: Shape
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        """Exact size, without the padding behind it."""
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return this component as a view of the page's bytes."""
        part = buffer[self.offset : self.offset + self.nbytes]
        if part.numel() == 0:
            part = buffer[:0]
        return part.view(self.dtype).view(self.shape)


class PageLayout:
    """Items and offsets of one page; immutable.

    Args:
        items: name, shape and dtype of every component, in the order they lie in.

    Example:
        >>> layout = PageLayout([(("a", ""), (3,), torch.float32), (("b", ""), (), torch.int64)])
        >>> layout.nbytes, layout[("b", "")].offset
        (512, 256)
    """

    __slots__ = ("_by_key", "items", "nbytes")

    items: tuple[PageItem, ...]
    nbytes: int
    _by_key: dict[Key, PageItem]

    def __init__(self, items: Iterable[tuple[Key, Shape, torch.dtype]]) -> None:
        placed, offset = [], 0
        for key, shape, dtype in items:
            item = PageItem(key, tuple(shape), dtype, offset)
            placed.append(item)
            offset = aligned(offset + item.nbytes)
        object.__setattr__(self, "items", tuple(placed))
        object.__setattr__(self, "nbytes", offset)
        object.__setattr__(self, "_by_key", {item.key: item for item in placed})
        if len(self._by_key) != len(placed):
            raise ValueError("a page holds two items of one name")

    @property
    def extent(self) -> int:
        """Bytes it takes in the arena or the store."""
        return aligned(self.nbytes, EXTENT)

    @classmethod
    def of(cls, specs: Mapping[str, TensorSpec]) -> PageLayout:
        """Lay out the tensors that ``specs`` describes, in its order."""
        return cls(
            ((name, component), shape, dtype)
            for name, spec in specs.items()
            for component, (shape, dtype) in spec.components().items()
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a PageLayout does not change")

    def __getitem__(self, key: Key) -> PageItem:
        return self._by_key[key]

    def __repr__(self) -> str:
        return f"PageLayout({len(self.items)} items, {self.nbytes} bytes)"

    def components(self, name: str, buffer: torch.Tensor) -> Components:
        """Return the components of one tensor as views of ``buffer``."""
        return {item.key[1]: item.view(buffer) for item in self.items if item.key[0] == name}

    def views(self, buffer: torch.Tensor) -> dict[Key, torch.Tensor]:
        """Return every item as a typed view.

        Args:
            buffer: uint8 ``[n]`` with n >= ``nbytes``, contiguous, aligned, on any device (``"meta"`` too).

        Raises:
            ValueError: the buffer is another dtype, too short or not aligned to the largest item.
        """
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
            raise ValueError(
                f"a page needs a contiguous 1-D uint8 buffer, not {list(buffer.shape)} {buffer.dtype}"
            )
        if buffer.numel() < self.nbytes:
            raise ValueError(f"a page of {self.nbytes} bytes does not fit into a buffer of {buffer.numel()}")
        return {item.key: item.view(buffer) for item in self.items}
