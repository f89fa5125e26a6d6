"""How a page's bytes get from its home into a slot, and how the two sides wait for each other.

On an accelerator a copy runs on a side stream. It waits for the computing that last read the slot, and computing
waits for it; the CPU waits for neither. What must be read from disk is read by threads, a cell at a time, each copied
as soon as it is there: the bus carries the first while the disk brings the next. With execution on the CPU they read
into the slot itself.
"""

from __future__ import annotations

import contextlib
import threading
from functools import partial
from typing import Any

import torch

from tuckaway.errors import PagingError
from tuckaway.paging.bounce import Bounces
from tuckaway.paging.checksums import CELL
from tuckaway.paging.fill import Fill
from tuckaway.paging.homes import PageHomes
from tuckaway.paging.slots import Slot
from tuckaway.paging.threads import is_reading_thread, reading_thread_count
from tuckaway.paging.units import PageUnit

__all__ = ["Transfer", "bounce_nbytes"]

_SPARE_BOUNCES = 4
"""Pieces beyond one for each reading thread: those whose copy is under way. The bus takes 4 MiB in 0.08 ms."""


def bounce_nbytes() -> int:
    """Return the bytes of pinned memory that disk pages pass through on their way to an accelerator."""
    return (reading_thread_count() + _SPARE_BOUNCES) * CELL


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
        self._bounces: Bounces | None = None
        self._fills: set[Fill] = set()
        self._lock = threading.Lock()
        self._closed = False

    def start(self, unit: PageUnit, slot: Slot) -> None:
        """Begin to fill ``slot``; :meth:`wait` ends it. Nobody may be using the slot."""
        if self._closed:
            raise PagingError("the model's pages were let go of", hint="load the model again")
        before: Fill | None = slot.fill
        if before is not None:
            before.cancel()
        if before is None or before.done():
            source = self.homes.in_memory(unit)
            if source is not None:
                slot.fill = None
                self._copy(source, slot)
                return
            before = None
        slot.fill = fill = Fill()
        self._fills.add(fill)
        begin = partial(self._begin, unit, slot, fill)
        # a fill that nobody wants any more ends before the next one into the same slot begins
        begin() if before is None else before.when_done(begin)

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

    def _begin(self, unit: PageUnit, slot: Slot, fill: Fill) -> None:
        """Start what fills the slot; in the thread that asked for it, or in the one that ended the fill before."""
        try:
            source = self.homes.in_memory(unit)
            if fill.cancelled or source is not None:
                self._end(fill, slot, source)
            else:
                self._read(unit, slot, fill)
        except BaseException as error:
            self._fills.discard(fill)
            fill.fail(error)

    def _read(self, unit: PageUnit, slot: Slot, fill: Fill) -> None:
        homes, number = self.homes, self.homes.number(unit)
        store, kept = homes.store, homes.kept(unit)
        assert store is not None
        reader = store.reader
        reader.refresh()
        ranges = reader.cells(number)
        bounced = kept is None and self.on_device
        if bounced:
            self._after_use(slot)
            self._make_bounces(reader.cell)
        into = slot.buffer if kept is None else kept
        fill.expect(len(ranges))

        def piece(cell: int) -> None:
            start, nbytes = ranges[cell]
            if not bounced:
                reader.read(number, cell, into[start:])
                return
            assert self._bounces is not None
            bounce = self._bounces.take()
            try:
                reader.read(number, cell, bounce.memory)
                with self._lock, self._stream:
                    into[start : start + nbytes].copy_(bounce.memory[:nbytes], non_blocking=True)
                    bounce.copied.record(self._stream)
            finally:
                self._bounces.give_back(bounce)

        def last() -> None:
            if kept is not None:
                self._copy(homes.keep(unit), slot)
            elif bounced:
                with self._lock:
                    slot.ready = self._stream.record_event()
            else:
                slot.buffer[:0].zero_()  # an in-place change that autograd sees

        done = partial(self._fills.discard, fill)
        fill.when_done(done)
        if not ranges:
            fill.end(last)
        threads = store.threads()
        for cell in range(len(ranges)):
            try:
                threads.submit(partial(fill.piece, partial(piece, cell), last))
            except RuntimeError as error:  # the threads were ended meanwhile
                fill.piece(partial(_fail, error), last)

    def _end(self, fill: Fill, slot: Slot, source: torch.Tensor | None) -> None:
        self._fills.discard(fill)
        fill.end(None if source is None else partial(self._copy, source, slot))

    def _copy(self, source: torch.Tensor, slot: Slot) -> None:
        target = slot.buffer[: source.numel()]
        if not self.on_device:
            target.copy_(source)
            return
        with self._lock:
            self._after_use_locked(slot)
            with self._stream:
                target.copy_(source, non_blocking=True)
                # an event of its own each time: another slot's wait may still refer to the last one
                slot.ready = self._stream.record_event()

    def _after_use(self, slot: Slot) -> None:
        with self._lock:
            self._after_use_locked(slot)

    def _after_use_locked(self, slot: Slot) -> None:
        for event in slot.used.values():
            self._stream.wait_event(event)
        slot.used = {}

    def _make_bounces(self, cell: int) -> None:
        with self._lock:
            if self._bounces is None:
                self._bounces = Bounces(reading_thread_count() + _SPARE_BOUNCES, cell, self.device)

    def __del__(self) -> None:
        # the slots' memory may be given to others as soon as they are gone
        if getattr(self, "_stream", None) is not None:
            with contextlib.suppress(RuntimeError):
                self._stream.synchronize()

    def close(self) -> None:
        """End what is under way and wait for the device. Twice does no harm."""
        self._closed = True
        fills = list(self._fills)
        for fill in fills:
            fill.cancel()
        # the last reference may go in one of the reading threads, which cannot wait for itself
        if not is_reading_thread():
            for fill in fills:
                fill.settle()
        if self._stream is not None:
            torch.accelerator.synchronize(self.device)
            self._stream = None
        if self._bounces is not None:
            self._bounces.close()
            self._bounces = None


def _fail(error: BaseException) -> None:
    raise error
