"""The few fixed buffers on the execution device that pages take turns in."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from tuckaway.paging.arena import host_memory

if TYPE_CHECKING:
    from tuckaway.paging.binding import Page

__all__ = ["Slot", "Slots", "device_memory"]

logger = logging.getLogger("tuckaway")


def device_memory(nbytes: int, device: torch.device) -> torch.Tensor:
    """Return uint8 ``[nbytes]`` on ``device``: an ordinary tensor, also when asked for under inference mode.

    A tensor made under ``torch.inference_mode`` could never be written to outside it. On the CPU it begins at a
    multiple of 4096, as direct reads want it.
    """
    with torch._C._InferenceMode(False):  # whatever interrupts it, the mode is as before
        if device.type == "cpu":
            return host_memory(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


class Slot:
    """One buffer, and whose bytes are in it.

    Attributes:
        buffer: uint8 ``[nbytes]``.
        page: the page it holds or is being filled with.
        fill: what fills it: None when nothing does or it was done on a stream; see :mod:`tuckaway.paging.transfer`.
        shared: whether its memory is known to be written to on the copies' stream.
        tick: when a page in it was last asked for; 0 after a fill that nobody has asked for yet.
    """

    __slots__ = ("buffer", "built", "fill", "index", "page", "ready", "shared", "tick", "used")

    def __init__(self, index: int, nbytes: int, device: torch.device) -> None:
        self.index = index
        self.buffer = device_memory(nbytes, device)
        self.page: Page | None = None
        self.fill: Any = None
        self.ready: Any = None
        self.used: dict[int, Any] = {}
        self.shared = False
        self.tick = 0
        self.built: dict[int, tuple[torch.Tensor, ...]] = {}


class Slots:
    """The pool: ``count`` slots of ``nbytes`` each, allocated at first use, and more when all are in use.

    Args:
        count: slots to have, two or more to overlap copying and computing.
        nbytes: size of the largest page.
        device: execution device.
    """

    def __init__(self, count: int, nbytes: int, device: torch.device) -> None:
        if count < 1:
            raise ValueError(f"a pager needs at least one slot, not {count}")
        self.count = count
        self.nbytes = nbytes
        self.device = device
        self.all: list[Slot] = []

    @property
    def allocated_nbytes(self) -> int:
        """Bytes on the device now."""
        return sum(slot.buffer.numel() for slot in self.all)

    def add(self, nbytes: int | None = None, *, prepare: Callable[[Slot], None] | None = None) -> Slot:
        """Allocate one more slot, of the common size or its own; it is in the pool once it was prepared."""
        slot = Slot(len(self.all), self.nbytes if nbytes is None else nbytes, self.device)
        if prepare is not None:
            prepare(slot)
        self.all.append(slot)
        return slot

    def clear(self) -> None:
        """Give the memory back."""
        self.all.clear()
