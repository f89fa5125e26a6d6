"""The ring: the buffers that a checkpoint's bytes pass through, and how many threads fill them.

Without a GPU two buffers and a thread are enough: reading from the page cache is faster than anything done with the
bytes. On the way to a GPU the buffers are pinned, so that copies run beside the reads, and a slot is filled anew only
when its copies are done. An H100's bus takes 55 GB/s; a thread reads 6 GB/s out of the page cache, 14 threads 39.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

__all__ = ["Ring", "Slot"]


@dataclass(frozen=True)
class Ring:
    """Size of the ring.

    Args:
        count: buffers.
        threads: threads that read.
        devices: accelerators that the bytes go to; their copies read from pinned buffers.
    """

    count: int = 2
    threads: int = 1
    devices: tuple[torch.device, ...] = ()

    @classmethod
    def towards(cls, *devices: torch.device) -> Ring:
        """Return the ring for bytes that go to ``devices``: to an accelerator, 16 pinned slots (256 MiB)."""
        accelerators = tuple(
            dict.fromkeys(device for device in devices if device.type not in ("cpu", "meta"))
        )
        if not accelerators:
            return cls()
        return cls(16, max(1, min(14, (os.cpu_count() or 2) - 2)), accelerators)

    def slots(self, nbytes: int) -> list[Slot]:
        """Return the buffers; each takes memory when it is first filled."""
        return [Slot(nbytes, self.devices) for _ in range(self.count)]


class Slot:
    """One buffer of the ring.

    Args:
        nbytes: its size.
        devices: as :class:`Ring` has them.
    """

    def __init__(self, nbytes: int, devices: tuple[torch.device, ...] = ()) -> None:
        self.nbytes = nbytes
        self.devices = devices
        self._memory: torch.Tensor | None = None
        self._copied: list[torch.Event] = []

    def memory(self, nbytes: int) -> torch.Tensor:
        """Return uint8 ``[>= nbytes]`` to fill, once nothing reads it any more.

        What is bigger than the slot gets memory of its own, for that one time.
        """
        for event in self._copied:
            event.synchronize()
        self._copied.clear()
        if nbytes > self.nbytes:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        if self._memory is None:
            self._memory = torch.empty(
                self.nbytes, dtype=torch.uint8, device="cpu", pin_memory=bool(self.devices)
            )
        return self._memory

    def handed_over(self) -> None:
        """Note that the caller has issued all copies out of it, on the devices' current streams."""
        for device in self.devices:
            with torch.accelerator.device_index(device.index):
                event = torch.Event(device)
                event.record(torch.accelerator.current_stream(device))
            self._copied.append(event)
