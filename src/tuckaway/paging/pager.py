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
from tuckaway.paging.binding import Page, Turn
from tuckaway.paging.capture import Recorder, Scope, Turns
from tuckaway.paging.homes import PageHomes
from tuckaway.paging.order import Order
from tuckaway.paging.slots import Slot, Slots, device_memory
from tuckaway.paging.transfer import Transfer

__all__ = ["Pager"]

logger = logging.getLogger("tuckaway")


_AHEAD, _WRONG = 0, -1
"""Ticks of a slot that was filled ahead of its page's turn, and of one whose guess went wrong."""


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

    def bring_in(self, page: Page, *, own: bool = False, turns: list[Turn] | None = None) -> Turn | None:
        """Bind the page's tensors; return the turn to :meth:`release`, or None if the page is gone for good.

        Args:
            page: which.
            own: bind storage of its own instead of a slot's, which autograd may keep after the turn.
            turns: where the turn is put before it holds anything, so that whoever has the list can end it whatever
                interrupts it.

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
        turn = Turn(page)
        try:
            if turns is not None:
                turns.append(turn)
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                self._capture(turn, own=own)
            else:
                self._bring_in(turn, own=own)
        except BaseException:
            self.release(turn)
            raise
        return turn

    def _bring_in(self, turn: Turn, *, own: bool) -> None:
        page = turn.page
        with self._lock:
            slot = self._enter(turn)
        try:
            self.transfer.wait(slot)
        except BaseException:
            with self._lock:
                page.users.discard(turn)
                # an interrupt is no reason: others may be reading the slot
                if page.slot is slot and not page.users and slot.fill is not None and slot.fill.failed:
                    page.slot = slot.page = None
            raise
        with self._lock:
            if not own:
                self._show(turn, None if page.turns else self._built(page, slot))
                return
            buffer = device_memory(page.unit.layout.nbytes, self.device)
            buffer.copy_(slot.buffer[: buffer.numel()])
            self._drop_replaced(page)
            self._show(turn, page.build(buffer, with_grad=True))
            page.own = True
            self._leave(turn)

    def _enter(self, turn: Turn) -> Slot:
        """Have the page in a slot, or on its way into one, for the turn; and the likely next page on its way."""
        page = turn.page
        if page.captured:
            raise _refuse_capture(page)
        slot = page.slot
        if slot is not None and not page.users and slot.fill is not None and not slot.fill.wanted:
            # it was brought ahead, perhaps long ago, and the disk may be well again; or nobody wanted it any more
            slot.page = None
            slot = page.slot = None
        if slot is None:
            for other in self.slots.all:
                other.tick = other.tick or _WRONG  # what was brought ahead was not what comes next
            slot = self._own_slot(page) if page.unit.outer else self._claim()
            self._fill(page, slot)
        turn.slot = slot
        page.users.add(turn)
        self._ticks += 1
        slot.tick = self._ticks
        if not page.unit.outer and not page.turns:
            self._look_ahead(page)
        return slot

    def release(self, turn: Turn) -> None:
        """End a turn: the page's parameters are on the meta device again, and its slot is free.

        Twice does no harm, nor when it was never whole.
        """
        page = turn.page
        with self._lock:
            scope, turn.scope = turn.scope, None
            if scope is not None:
                self._leave_capture(turn, scope)
            self._leave(turn)
            ended = turn in page.turns
            if ended and len(page.turns) == 1 and not page.gone:
                page.own = page.captured = False
                for binding in page.bindings:
                    binding.tensors[binding.attribute] = binding.away
            page.turns.discard(turn)

    def _built(self, page: Page, slot: Slot) -> tuple[torch.Tensor, ...]:
        self._drop_replaced(page)
        tensors = slot.built.get(page.unit.index)
        if tensors is None:
            tensors = slot.built[page.unit.index] = page.build(slot.buffer, with_grad=False)
        return tensors

    def _leave(self, turn: Turn) -> None:
        """Let go of the turn's slot."""
        if turn.slot is not None and turn in turn.page.users:
            self.transfer.used(turn.slot)
            turn.page.users.discard(turn)

    def _show(self, turn: Turn, tensors: tuple[torch.Tensor, ...] | None) -> None:
        """Begin the turn, with these tensors in the page's places; None leaves those that another turn put there."""
        turn.page.turns.add(
            turn
        )  # first of all: its end takes the tensors out again, those that are there by then
        if tensors is not None:
            for binding, tensor in zip(turn.page.bindings, tensors, strict=True):
                binding.tensors[binding.attribute] = tensor

    def _drop_replaced(self, page: Page) -> None:
        """Leave alone what somebody put in a paged tensor's place, before the first turn of some."""
        if page.turns or all(b.tensors.get(b.attribute) is b.away for b in page.bindings):
            return
        for slot in (*self.slots.all, *self._own_slots.values()):
            slot.built.pop(page.unit.index, None)
        kept = []
        for binding in page.bindings:
            if binding.tensors.get(binding.attribute) is binding.away:
                kept.append(binding)
            else:
                logger.debug("%r was replaced and is not paged any more", binding.name)
        page.bindings = kept

    # Slots

    def _claim(self) -> Slot:
        """Find a slot whose page is in nobody's turn, or allocate one."""
        slot = self._find()
        if slot is None:
            slot = self._add()
            logger.debug("more than %d pages in use at once: allocated slot %d", self.slots.count, slot.index)
        return slot

    def _find(self, sooner: Collection[Page] | None = None) -> Slot | None:
        """Find a slot; for a guess, without taking one from a page that is expected ``sooner``."""
        while len(self.slots.all) < self.slots.count:
            self._add()
        free = [slot for slot in self.slots.all if slot.page is None or not slot.page.users]
        if sooner is not None:
            # nor from one that was brought ahead and still waits for its turn
            free = [s for s in free if s.page is None or (s.tick != _AHEAD and s.page not in sooner)]
        return max(free, key=self._spare, default=None)

    def _add(self) -> Slot:
        return self.slots.add(prepare=self.transfer.used)

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
            slot = Slot(-1, page.unit.layout.nbytes, self.device)
            self.transfer.used(slot)
            self._own_slots[page.unit.index] = slot
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

    def _capture(self, turn: Turn, *, own: bool) -> None:
        """Bind the page in a slot that only this graph uses, filled by a copy that is part of the graph."""
        page = turn.page
        with self._lock:
            if page.turns and not page.captured:
                raise _refuse_capture(page)
            turn.slot, turn.scope = self._slot_in_graph(page)
            if own:
                buffer = device_memory(page.unit.layout.nbytes, self.device)
                buffer.copy_(turn.slot.buffer[: buffer.numel()])
                self._drop_replaced(page)
                self._show(turn, page.build(buffer, with_grad=True))
                page.own = True
            else:
                self._show(turn, None if page.turns else self._built(page, turn.slot))
            page.captured = True

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
                slot.page = page.slot = (
                    None  # before it is cancelled: what is in the slot then is nobody's page
                )
                if slot.fill is not None:
                    slot.fill.cancel()
                    slot.fill.settle()

    def take_out(self, page: Page) -> None:
        """Stop paging a page: whoever calls it binds real tensors in its place."""
        with self._lock:
            page.gone = True
            if page.slot is not None and not page.users:
                page.slot.page = None
                page.slot = None

    def close(self) -> None:
        """Stop the worker, wait for copies, give the slots' memory back. Twice does no harm."""
        with self._lock:
            for page in self.pages:
                page.slot = None  # before fills are cancelled
        self.transfer.close()
        with self._lock:
            self.slots.clear()
            self._own_slots.clear()


def _refuse_capture(page: Page) -> PagingError:
    return PagingError(
        f"the page {page.unit.name!r} is in use by one forward that is captured in a graph and by another",
        hint="let other forwards of the model end before a graph is captured",
    )
