"""Pinned pieces of memory that what is read from disk passes through on its way to the device: :class:`Bounces`."""

from __future__ import annotations

import queue
import threading
from typing import Any

import torch

from tuckaway.paging.arena import Arena
from tuckaway.paging.page import PageLayout

__all__ = ["Bounce", "Bounces", "Run"]


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


class Run:
    """Cells that lie in a row: read by threads into one piece, and copied out of it at once.

    Args:
        bounces: where the piece comes from when the first cell is read; runs must be begun in order.
        cells: how many.
    """

    __slots__ = ("_bounces", "_left", "_lock", "bounce")

    def __init__(self, bounces: Bounces, cells: int) -> None:
        self._bounces = bounces
        self._left = cells
        self._lock = threading.Lock()
        self.bounce: Bounce | None = None

    def memory(self) -> torch.Tensor:
        """Return the piece, waiting for one if no cell of the run has it yet."""
        with self._lock:
            if self.bounce is None:
                self.bounce = self._bounces.take()
            return self.bounce.memory

    def ends(self) -> bool:
        """Note that one cell was read, or will not be, and tell whether it was the last."""
        with self._lock:
            self._left -= 1
            return self._left == 0

    def give_back(self) -> None:
        """Hand the piece back, if there is one."""
        if self.bounce is not None:
            self._bounces.give_back(self.bounce)
            self.bounce = None
