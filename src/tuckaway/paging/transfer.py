"""How a page's bytes get from its home into a slot, and how the two sides wait for each other.

On an accelerator a copy runs on a side stream. It waits for the computing that last read the slot, and computing
waits for it; the CPU waits for neither. What must be read from disk is read by one worker thread, in order, through
a pinned bounce buffer; with execution on the CPU it reads into the slot itself.
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from tuckaway.errors import PagingError
from tuckaway.paging.arena import Arena
from tuckaway.paging.homes import PageHomes
from tuckaway.paging.slots import Slot
from tuckaway.paging.units import PageUnit

__all__ = ["Transfer"]


class Transfer:
    """Fills slots of one device from the homes of one plan.

    Args:
        homes: arena and store.
        device: where the slots are.
    """

    def __init__(self, homes: PageHomes, device: torch.device) -> None:
        self.homes = homes
        self.device = device
        self.on_device = device.type != "cpu"
        self._stream: Any = torch.Stream(device=device) if self.on_device else None
        self._worker: ThreadPoolExecutor | None = None
        self._bounces: Arena | None = None
        self._bounced: list[Any] = [None, None]
        self._turn = False
        self._closed = False

    def start(self, unit: PageUnit, slot: Slot) -> None:
        """Begin to fill ``slot``; :meth:`wait` ends it. Nobody may be using the slot."""
        if self._closed:
            raise PagingError("the model's pages were let go of", hint="load the model again")
        before: Future[None] | None = slot.fill
        busy = before is not None and not before.cancel() and not before.done()
        if unit.home == "disk" or busy:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, thread_name_prefix="tuckaway-page")
            # one worker: a fill that nobody wants any more ends before the next one into the same slot begins
            slot.fill = self._worker.submit(self._fill, unit, slot)
        else:
            slot.fill = None
            self._fill(unit, slot)

    def wait(self, slot: Slot) -> None:
        """Wait until the slot is filled: the thread for the disk, the current stream for the copy."""
        fill = slot.fill
        if fill is not None:
            fill.result()
        if slot.ready is not None:
            torch.accelerator.current_stream(self.device).wait_event(slot.ready)

    def used(self, slot: Slot) -> None:
        """Note that the current stream has work that reads the slot."""
        if self.on_device:
            stream = torch.accelerator.current_stream(self.device)
            event = slot.used.get(stream.stream_id)
            if event is None:
                event = slot.used[stream.stream_id] = torch.Event(self.device)
            event.record(stream)

    def capturing(self) -> bool:
        """Whether the current stream is being captured into a graph."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def capture(self, unit: PageUnit, slot: Slot) -> None:
        """Put the copy of a CPU page into the graph that is being captured, on its own stream.

        Raises:
            PagingError: the page is on disk.
        """
        arena = self.homes.arena
        if unit.home == "disk" or arena is None or not arena.pinned:
            raise PagingError(
                f"the page {unit.name!r} is on disk or in unpinned memory and cannot be captured in a graph",
                hint="map it to the GPU or the CPU, or run without graphs",
            )
        source = arena.page(self.homes.number(unit))
        slot.buffer[: source.numel()].copy_(source, non_blocking=True)

    def _fill(self, unit: PageUnit, slot: Slot) -> None:
        number = self.homes.number(unit)
        target = slot.buffer[: unit.layout.nbytes]
        arena, store = self.homes.arena, self.homes.store
        if arena is not None and unit.home == "cpu":
            if self.on_device:
                self._copy(arena.page(number), slot)
            else:
                target.copy_(arena.page(number))
        elif store is not None and not self.on_device:
            store.read(number, target)
            target[:0].zero_()  # an in-place change that autograd sees
        elif store is not None:
            bounce = self._bounce()
            store.read(number, bounce)
            self._copy(bounce[: unit.layout.nbytes], slot)
            self._bounced.append(slot.ready)

    def _copy(self, source: torch.Tensor, slot: Slot) -> None:
        stream = self._stream
        for event in slot.used.values():
            stream.wait_event(event)
        slot.used = {}
        with stream:
            slot.buffer[: source.numel()].copy_(source, non_blocking=True)
            # an event of its own each time: another slot's wait may still refer to the last one
            slot.ready = stream.record_event()

    def _bounce(self) -> torch.Tensor:
        """The one of two pinned buffers whose copy is over: one is read into while the other is copied from."""
        if self._bounces is None:
            largest = max(self.homes.plan.homed("disk"), key=lambda unit: unit.layout.nbytes)
            self._bounces = Arena([largest.layout] * 2)
            self._bounces.pin()
        last = self._bounced.pop(0)
        if last is not None:
            last.synchronize()
        self._turn = not self._turn
        return self._bounces.page(int(self._turn))

    def __del__(self) -> None:
        # the slots' memory may be given to others as soon as they are gone
        if getattr(self, "_stream", None) is not None:
            with contextlib.suppress(RuntimeError):
                self._stream.synchronize()

    def close(self) -> None:
        """Join the worker and wait for the device. Twice does no harm."""
        self._closed = True
        if self._worker is not None:
            self._worker.shutdown(
                wait=threading.current_thread().name != "tuckaway-page_0", cancel_futures=True
            )
            self._worker = None
        if self._stream is not None:
            torch.accelerator.synchronize(self.device)
            self._stream = None
        if self._bounces is not None:
            self._bounces.close()
            self._bounces = None
