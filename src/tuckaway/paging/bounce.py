"""Pinned pieces of memory that what is read from disk passes through on its way to the device: :class:`Bounces`."""

from __future__ import annotations

import queue
from typing import Any

import torch

from tuckaway.paging.arena import Arena
from tuckaway.paging.page import PageLayout

__all__ = ["Bounces"]


class Bounces:
    """A pool of equal pieces; a piece is free again when the copy out of it is over.

    Args:
        count: pieces.
        nbytes: of each, a multiple of 4096.
        pin: lock them for fast copies.
    """

    def __init__(self, count: int, nbytes: int, *, pin: bool = True) -> None:
        layout = PageLayout([(("piece", ""), (nbytes,), torch.uint8)])
        self._arena = Arena([layout] * count, pin=pin)
        self._arena.pin()
        self._free: queue.SimpleQueue[tuple[torch.Tensor, Any]] = queue.SimpleQueue()
        for index in range(count):
            self._free.put((self._arena.page(index), None))

    def take(self) -> torch.Tensor:
        """Return a piece that nothing reads any more; waits for one."""
        piece, copied = self._free.get()
        if copied is not None and not copied.query():
            copied.synchronize()
        return piece

    def give_back(self, piece: torch.Tensor, copied: Any) -> None:
        """Hand a piece back; ``copied`` is the event after the copy out of it, None if there was none."""
        self._free.put((piece, copied))

    def close(self) -> None:
        """Unpin. Nothing may be under way."""
        self._arena.close()
