"""How a page's bytes get from its home into a slot, and how the two sides wait for each other.

On an accelerator a copy runs on a side stream. It waits for the computing that last read the slot, and computing
waits for it; the CPU waits for neither. What must be read from disk is read by threads, a cell at a time, each copied
as soon as it is there: the bus carries the first while the disk brings the next. With execution on the CPU they read
into the slot itself.
"""

from __future__ import annotations

import threading
import weakref
from functools import partial
from typing import Any

import torch

from tuckaway.errors import PagingError
from tuckaway.paging.bounce import Bounces, Run
from tuckaway.paging.fill import Fill
from tuckaway.paging.homes import PageHomes
from tuckaway.paging.slots import Slot
from tuckaway.paging.store import Store
from tuckaway.paging.threads import is_reading_thread
from tuckaway.paging.units import PageUnit

__all__ = ["Transfer", "bounce_nbytes"]

_RUN_BYTES = 32 * 2**20
"""Bytes from disk that one copy carries to the device.

What a copy costs is Python's: whoever launches it lets the interpreter go and must get it back from 14 threads, while
the others wait for their turn. From the page cache to an H100: 43 GB/s with 8 MiB, 52 with 32; with a main thread that
computes in Python 34 and 48.
"""
_RUNS = 6
"""Runs under way: the cells of three keep 14 threads reading, the rest are being copied."""


def bounce_nbytes() -> int:
    """Return the bytes of pinned memory that disk pages pass through on their way to an accelerator, at most."""
    return _RUNS * _RUN_BYTES


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
        self._each = 1
        self._fills: weakref.WeakSet[Fill] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._closed = False

    def start(self, unit: PageUnit, slot: Slot) -> None:
        """Begin to fill ``slot``; :meth:`wait` ends it. Nobody may be using the slot."""
        if self._closed:
            raise PagingError("the model's pages were let go of", hint="load the model again")
        before: Fill | None = slot.fill
        if before is not None:
            before.cancel()
            if before.done():
                before = None
        source = self.homes.in_memory(unit)
        if source is not None and before is None:
            slot.fill = None
            self._copy(source, slot)
            return
        store = self.homes.store
        assert store is not None
        fill = slot.fill = Fill(store.submit, before)
        try:
            self._fills.add(fill)
            if source is not None:
                fill.begin([partial(self._copy, source, slot)])
            else:
                self._read(store, unit, slot, fill)
        except Exception as error:
            fill.fail(
                error
            )  # told to who waits; an interrupt is this thread's, and nobody waits for the page

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

    def _read(self, store: Store, unit: PageUnit, slot: Slot, fill: Fill) -> None:
        kept, number = self.homes.kept(unit), self.homes.number(unit)
        store.reader.refresh()
        count, around = len(store.reader.cells(number)), store.reader.goes_around(number)
        if kept is not None or not self.on_device:
            into = slot.buffer if kept is None else kept
            piece = partial(self._read_cell, store, number, into, fill, around)
        else:
            bounces, each = self._bouncing(store)
            runs = [Run(bounces, min(each, count - first)) for first in range(0, count, each)]
            piece = partial(self._bounce_cell, store, number, slot, fill, around, runs, each)
        fill.begin((partial(piece, cell) for cell in range(count)), partial(self._filled, unit, slot, kept))

    def _read_cell(
        self, store: Store, number: int, into: torch.Tensor, fill: Fill, around: bool, cell: int
    ) -> None:
        if fill.wanted:
            store.reader.read(number, cell, into[store.reader.cells(number)[cell][0] :], around=around)

    def _bounce_cell(
        self,
        store: Store,
        number: int,
        slot: Slot,
        fill: Fill,
        around: bool,
        runs: list[Run],
        each: int,
        cell: int,
    ) -> None:
        """Read a cell into its run's piece; whoever reads the last of a run launches its copy."""
        run, reader = runs[cell // each], store.reader
        start = cell // each * each * reader.cell
        try:
            if fill.wanted:
                reader.read(number, cell, run.memory()[cell * reader.cell - start :], around=around)
        except BaseException as error:
            fill.spoil(error)
        if run.ends():
            bounce = run.bounce
            try:
                if bounce is not None and fill.wanted:
                    source = bounce.memory[: min(each * reader.cell, store.layouts[number].nbytes - start)]
                    with self._lock:
                        # not before: copies for the page before this one would wait for a turn that is not theirs
                        self._after_use(slot)
                        with self._stream:
                            slot.buffer[start : start + source.numel()].copy_(source, non_blocking=True)
                            bounce.copied.record(self._stream)
            finally:
                run.give_back()

    def _filled(self, unit: PageUnit, slot: Slot, kept: torch.Tensor | None) -> None:
        """All cells were read."""
        if kept is not None:
            self._copy(self.homes.keep(unit), slot)
        elif self.on_device:
            with self._lock:
                slot.ready = self._stream.record_event()
        else:
            slot.buffer[:0].zero_()  # an in-place change that autograd sees

    def _copy(self, source: torch.Tensor, slot: Slot) -> None:
        target = slot.buffer[: source.numel()]
        if not self.on_device:
            target.copy_(source)
            return
        with self._lock:
            self._after_use(slot)
            with self._stream:
                target.copy_(source, non_blocking=True)
                # an event of its own each time: another slot's wait may still refer to the last one
                slot.ready = self._stream.record_event()

    def _after_use(self, slot: Slot) -> None:
        """Let copies from now on wait for what reads the slot. With the lock."""
        if not (slot.shared or slot.buffer.is_cpu):
            # a model may go while a copy is under way: its slots' memory is nobody else's before the copy is over
            slot.buffer.record_stream(self._stream)
            slot.shared = True
        for event in slot.used.values():
            self._stream.wait_event(event)
        slot.used = {}

    def _bouncing(self, store: Store) -> tuple[Bounces, int]:
        """Return the pieces, and how many cells one takes."""
        with self._lock:
            if self._bounces is None:
                cell, largest = store.reader.cell, max(layout.extent for layout in store.layouts)
                nbytes = min(_RUN_BYTES // cell * cell or cell, largest)
                self._bounces, self._each = Bounces(_RUNS, nbytes, self.device), -(-nbytes // cell)
            return self._bounces, self._each

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
