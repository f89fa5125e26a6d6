"""Pinned pieces of memory that what is read from disk passes through on its way to the device: :class:`Bounces`."""

from __future__ import annotations

import queue
from typing import Any

import torch

from tuckaway.paging.arena import Arena
from tuckaway.paging.page import PageLayout

__all__ = ["Bounce", "Bounces"]


class Bounce:
    """One piece.

    Attributes:
        memory: uint8 ``[nbytes]``, pinned.
        copied: event to record after the copy out of it.
    """

    __slots__ = ("copied", "memory")

    def __init__(self, memory: torch.Tensor, copied: Any) -> None:
        self.memory = memory
        self.copied = copied


class Bounces:
    """A pool of equal pieces; a piece is free again when the copy out of it is over.

    All of them together should fit into the processor's last cache: a page cached in RAM then crosses the memory bus
    once instead of three times (read, written to the piece, read by the device), and that bus is the limit.

    Args:
        count: pieces.
        nbytes: of each, a multiple of 4096.
        device: which copies out of them.
    """

    def __init__(self, count: int, nbytes: int, device: torch.device) -> None:
        layout = PageLayout([(("piece", ""), (nbytes,), torch.uint8)])
        on_device = device.type != "cpu"
        self._arena = Arena([layout] * count, pin=on_device, device=device if on_device else None)
        self._arena.pin()
        self._free: queue.SimpleQueue[Bounce] = queue.SimpleQueue()
        for index in range(count):
            self._free.put(Bounce(self._arena.page(index), torch.Event(device) if on_device else None))

    def take(self) -> Bounce:
        """Return a piece that nothing reads any more; waits for one."""
        bounce = self._free.get()
        if bounce.copied is not None and not bounce.copied.query():
            bounce.copied.synchronize()
        return bounce

    def give_back(self, bounce: Bounce) -> None:
        """Hand a piece back; the copy out of it may still be under way."""
        self._free.put(bounce)

    def close(self) -> None:
        """Unpin. Nothing may be under way."""
        self._arena.close()
