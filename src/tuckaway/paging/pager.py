"""Who is in which slot: brings pages in for their turn, and the likely next one ahead of it.

What comes next is learned: a page follows what followed it, and the page before it, last time. Until something was
seen, that is the model's order. A wrong guess costs a copy and nothing else, so any order is right: repeated and
skipped blocks, branches, early exits, and the first block of the next token after the last of this one.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch

from tuckaway.errors import PagingError
from tuckaway.paging.binding import Page
from tuckaway.paging.capture import Recorder, Scope, Turns
from tuckaway.paging.homes import PageHomes
from tuckaway.paging.order import Order
from tuckaway.paging.slots import Slot, Slots, device_memory
from tuckaway.paging.transfer import Transfer

__all__ = ["Pager", "Turn"]

logger = logging.getLogger("tuckaway")


_AHEAD, _WRONG = 0, -1
"""Ticks of a slot that was filled ahead of its page's turn, and of one whose guess went wrong."""


class Turn:
    """A page brought in for one forward; hand it back with :meth:`Pager.release`."""

    __slots__ = ("page", "scope", "slot")

    def __init__(self, page: Page, slot: Slot | None, scope: Turns | None = None) -> None:
        self.page = page
        self.slot = slot
        self.scope = scope


class Pager:
    """Brings pages in and lets go of them. Safe to use from several threads.

    Args:
        pages: in the model's order.
        homes: where their bytes are; closed with the pager.
        device: execution device.
        slots: pages on the device at once; two let the next one come while this one computes.
    """

    def __init__(
        self, pages: Sequence[Page], homes: PageHomes, device: torch.device, *, slots: int = 2
    ) -> None:
        self.pages = tuple(pages)
        self.device = device
        self.homes = homes
        self.transfer = Transfer(homes, device)
        turning = [page for page in pages if not page.unit.outer]
        self.order = Order(turning)
        self._cycle = len(turning)
        largest = max((page.unit.layout.nbytes for page in turning), default=0)
        self.slots = Slots(max(min(slots, len(turning)), 1), largest, device)
        self._own_slots: dict[int, Slot] = {}
        # of the pool that few others draw from: a copy on a stream that is being captured becomes part of the graph
        self._graph_stream: Any = torch.Stream(device=device, priority=-1) if device.type == "cuda" else None
        self._lock = threading.RLock()
        self._ticks = 0
        self._local = threading.local()
        self._pid = os.getpid()
        self.steps: weakref.WeakSet[Any] = weakref.WeakSet()

    # A forward of the whole model

    def begin_forward(self, owner: object = None, *, recorder: Recorder | None = None) -> None:
        """Note that a forward of the whole model begins in this thread.

        Args:
            owner: who says when it ends, if not the model's own hook.
            recorder: captures it in several graphs.
        """
        local = self._local
        if owner is None and getattr(local, "owner", None) is not None:
            return
        local.scope, local.recorder, local.owner, local.inside = None, recorder, owner, True
        self.order.begin()

    def end_forward(self, owner: object = None) -> None:
        """Note that it ended: what follows its last page is another forward, perhaps another graph."""
        local = self._local
        if getattr(local, "owner", None) is not owner:
            return
        local.inside, local.owner, local.recorder = False, None, None
        self.order.end()
        self._close_scope()

    def _close_scope(self) -> None:
        scope: Scope | None = getattr(self._local, "scope", None)
        self._local.scope = None
        if scope is not None:
            scope.close()

    # A page's turn

    def bring_in(self, page: Page, *, own: bool = False) -> Turn | None:
        """Bind the page's tensors; return the turn to :meth:`release`, or None if the page is gone for good.

        Args:
            page: which.
            own: bind storage of its own instead of a slot's, which autograd may keep after the turn.

        Raises:
            PagingError: this process is a fork of the one that loaded the model; or one forward of the model is
                captured in a graph while another runs.
            StoreError: its bytes cannot be read.
            ChecksumError: its bytes changed on disk.
        """
        if page.gone:
            return None
        if os.getpid() != self._pid:
            raise PagingError(
                "the model was loaded before this process was forked, and its threads and streams stayed behind",
                hint="load it in this process, or start processes with the 'spawn' method",
            )
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self._capture(page, own=own)
        with self._lock:
            if page.captured:
                raise _refuse_capture(page)
            slot = page.slot
            if slot is not None and page.users == 0 and slot.fill is not None and slot.fill.failed:
                # it was brought ahead, perhaps long ago, and the disk may be well again
                slot.page = None
                slot = page.slot = None
            if slot is None:
                for other in self.slots.all:
                    other.tick = other.tick or _WRONG  # what was brought ahead was not what comes next
                slot = self._own_slot(page) if page.unit.outer else self._claim()
                self._fill(page, slot)
            page.users += 1
            self._ticks += 1
            slot.tick = self._ticks
            if not page.unit.outer and page.turns == 0:
                self._look_ahead(page)
        try:
            self.transfer.wait(slot)
        except BaseException:
            with self._lock:
                page.users -= 1
                if page.slot is slot and (slot.fill is None or slot.fill.done()):
                    page.slot = None
                    slot.page = None
            raise
        with self._lock:
            if not own:
                if page.turns == 0:
                    self._bind(page, self._built(page, slot))
                page.turns += 1
                return Turn(page, slot)
            try:
                buffer = device_memory(page.unit.layout.nbytes, self.device)
                buffer.copy_(slot.buffer[: buffer.numel()])
                self._bind(page, page.build(buffer, with_grad=True))
                page.turns += 1
                page.own = True
            finally:
                self._leave(page, slot)
            return Turn(page, None)

    def release(self, turn: Turn) -> None:
        """End a turn: the page's parameters are on the meta device again, and its slot is free."""
        page = turn.page
        with self._lock:
            if turn.scope is not None:
                self._leave_capture(turn, turn.scope)
            elif turn.slot is not None:
                self._leave(page, turn.slot)
            page.turns -= 1
            if page.turns == 0 and not page.gone:
                page.own = page.captured = False
                for binding in page.bindings:
                    binding.tensors[binding.attribute] = binding.away

    def _built(self, page: Page, slot: Slot) -> tuple[torch.Tensor, ...]:
        tensors = slot.built.get(page.unit.index)
        if tensors is None:
            tensors = slot.built[page.unit.index] = page.build(slot.buffer, with_grad=False)
        return tensors

    def _leave(self, page: Page, slot: Slot) -> None:
        self.transfer.used(slot)
        page.users -= 1

    def _bind(self, page: Page, tensors: tuple[torch.Tensor, ...]) -> None:
        replaced = False
        for binding, tensor in zip(page.bindings, tensors, strict=True):
            if page.turns == 0 and binding.tensors.get(binding.attribute) is not binding.away:
                replaced = True
            else:
                binding.tensors[binding.attribute] = tensor
        if replaced:
            self._drop_replaced(page, tensors)

    def _drop_replaced(self, page: Page, tensors: tuple[torch.Tensor, ...]) -> None:
        """Leave alone what somebody put in a paged tensor's place."""
        bound = {id(tensor) for tensor in tensors}
        kept = []
        for binding in page.bindings:
            if id(binding.tensors.get(binding.attribute)) in bound:
                kept.append(binding)
            else:
                logger.debug("%r was replaced and is not paged any more", binding.name)
        page.bindings = kept
        for slot in (*self.slots.all, *self._own_slots.values()):
            slot.built.pop(page.unit.index, None)

    # Slots

    def _claim(self) -> Slot:
        """Find a slot whose page is in nobody's turn, or allocate one."""
        slot = self._find()
        if slot is None:
            slot = self.slots.add()
            self.transfer.used(slot)
            logger.debug("more than %d pages in use at once: allocated slot %d", self.slots.count, slot.index)
        return slot

    def _find(self, sooner: Collection[Page] | None = None) -> Slot | None:
        """Find a slot; for a guess, without taking one from a page that is expected ``sooner``."""
        while len(self.slots.all) < self.slots.count:
            self.transfer.used(self.slots.add())
        free = [slot for slot in self.slots.all if slot.page is None or slot.page.users == 0]
        if sooner is not None:
            # nor from one that was brought ahead and still waits for its turn
            free = [s for s in free if s.page is None or (s.tick != _AHEAD and s.page not in sooner)]
        return max(free, key=self._spare, default=None)

    def _spare(self, slot: Slot) -> tuple[int, int]:
        """How little a slot's page will be missed."""
        if slot.page is None:
            return 3, 0
        if slot.tick == _AHEAD:
            return 0, 0
        # in a cycle the page used last is needed last; one not used for two cycles has left the cycle
        age = self._ticks - slot.tick
        left = slot.tick == _WRONG or age > 2 * self._cycle
        return (2, age) if left else (1, slot.tick)

    def _own_slot(self, page: Page) -> Slot:
        slot = self._own_slots.get(page.unit.index)
        if slot is None:
            slot = self._own_slots[page.unit.index] = Slot(-1, page.unit.layout.nbytes, self.device)
            self.transfer.used(slot)
        return slot

    def _fill(self, page: Page, slot: Slot) -> None:
        if slot.page is not None:
            slot.page.slot = None
            slot.page = None
        self.transfer.start(page.unit, slot)
        slot.page, page.slot = page, slot
        slot.tick = _AHEAD

    # What comes next

    def _look_ahead(self, page: Page) -> None:
        last, here = self.order.note(page), page
        sooner: list[Page] = []
        for _ in range(len(self.slots.all)):
            guess = self.order.guess(last, here)
            if guess is None or guess.gone:
                return
            last, here = here.unit.index, guess
            if guess.slot is None:
                slot = self._find(sooner)
                if slot is not None:
                    self._fill(guess, slot)
                return
            sooner.append(guess)

    # Graph capture

    def _capture(self, page: Page, *, own: bool) -> Turn:
        """Bind the page in a slot that only this graph uses, filled by a copy that is part of the graph."""
        with self._lock:
            if page.turns and not page.captured:
                raise _refuse_capture(page)
            slot, turns = self._slot_in_graph(page)
            if own:
                buffer = device_memory(page.unit.layout.nbytes, self.device)
                buffer.copy_(slot.buffer[: buffer.numel()])
                self._bind(page, page.build(buffer, with_grad=True))
                page.own = True
            elif page.turns == 0:
                self._bind(page, self._built(page, slot))
            page.turns += 1
            page.captured = True
            return Turn(page, slot, turns)

    def _slot_in_graph(self, page: Page) -> tuple[Slot, Turns]:
        local = self._local
        recorder: Recorder | None = getattr(local, "recorder", None)
        if recorder is not None and self.homes.pinned(page.unit) is None:
            self._close_scope()
            if not page.unit.outer:
                self.order.note(page)
            return recorder.cut(page), recorder
        scope: Scope | None = getattr(local, "scope", None)
        if scope is None:
            scope = local.scope = Scope(self, self._graph_stream)
        return scope.bring_in(page), scope

    def _leave_capture(self, turn: Turn, turns: Turns) -> None:
        assert turn.slot is not None
        turns.leave(turn.slot)
        # without a forward of the whole model around it nobody else will say when to join
        if not getattr(self._local, "inside", False) and turns.idle:
            self._close_scope()

    # Ending

    @property
    def nbytes(self) -> int:
        """Bytes on the execution device now, without the slots in graphs."""
        own = sum(slot.buffer.numel() for slot in self._own_slots.values())
        return self.slots.allocated_nbytes + own

    def settle(self) -> None:
        """Wait for all that is read from disk."""
        with self._lock:
            for slot in (*self.slots.all, *self._own_slots.values()):
                if slot.fill is not None:
                    slot.fill.settle()

    def forget(self, page: Page) -> None:
        """Bring a page in anew at its next turn, because its home changed.

        Raises:
            PagingError: its slot is in use.
        """
        with self._lock:
            if page.users:
                raise PagingError(f"the page {page.unit.name!r} is in use by a forward")
            for step in self.steps:
                step.forget(page)
            slot = page.slot
            if slot is not None:
                if slot.fill is not None:
                    slot.fill.cancel()
                    slot.fill.settle()
                slot.page = None
                page.slot = None

    def take_out(self, page: Page) -> None:
        """Stop paging a page: whoever calls it binds real tensors in its place."""
        with self._lock:
            page.gone = True
            if page.slot is not None and page.users == 0:
                page.slot.page = None
                page.slot = None

    def close(self) -> None:
        """Stop the worker, wait for copies, give the slots' memory back. Twice does no harm."""
        self.transfer.close()
        with self._lock:
            for page in self.pages:
                page.slot = None
            self.slots.clear()
            self._own_slots.clear()


def _refuse_capture(page: Page) -> PagingError:
    return PagingError(
        f"the page {page.unit.name!r} is in use by one forward that is captured in a graph and by another",
        hint="let other forwards of the model end before a graph is captured",
    )
