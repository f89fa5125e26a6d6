"""Pages in a CUDA graph: :class:`Scope`, the turns of one forward while a graph is being captured.

Copies become nodes of the graph. They run on a side stream that forks from the capturing one at the forward's first
page and joins it at its end, each as soon as the product before it has left its slot: a replay is one launch, and
moves bytes at 54.7 GB/s as the eager pager does. Every replay begins with the copy of its first page, so that its bits
are right whatever ran in between; what that costs is the compute of the last page and the head, 1 % of a token.

The slots are allocated while capturing, so they lie in the graph's own pool: two graphs never share one, and they go
with the graph.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tuckaway.errors import PagingError
from tuckaway.paging.binding import Page
from tuckaway.paging.slots import Slot

if TYPE_CHECKING:
    from tuckaway.paging.pager import Pager

__all__ = ["Recorder", "Scope", "Turns"]


class Turns(Protocol):
    """What a turn in a graph is handed back to."""

    @property
    def idle(self) -> bool:
        """Whether no page is in its turn."""

    def leave(self, slot: Slot) -> None:
        """End a turn."""


class Recorder(Turns, Protocol):
    """Who captures a forward in several graphs, cut where a page must be brought in from outside."""

    def cut(self, page: Page) -> Slot:
        """Begin the next graph; the page will be in the slot that is returned before it runs."""

    def forget(self, page: Page) -> None:
        """The page's home changed."""


class Scope:
    """The slots of one forward in one graph.

    Args:
        pager: whose pages; it foresees what comes next.
        stream: the side stream; nothing else may use it meanwhile.
    """

    def __init__(self, pager: Pager, stream: Any) -> None:
        self.pager = pager
        self.stream = stream
        self._slots: list[Slot] = []
        self._users: dict[int, int] = {}
        self._at: dict[int, Slot] = {}
        self._ahead: set[int] = set()
        stream.wait_event(self._now())

    @property
    def idle(self) -> bool:
        """Whether no page is in its turn."""
        return not any(self._users.values())

    def bring_in(self, page: Page) -> Slot:
        """Put the copy of a page into the graph, unless it is there ahead of its turn, and what waits for it.

        Raises:
            PagingError: its bytes are not in pinned memory.
        """
        slot = self._at.get(page.unit.index)
        if slot is None:
            slot = self._claim(page.unit.layout.nbytes)
            self._fill(page, slot)
        self._users[slot.index] += 1
        self._ahead.discard(page.unit.index)
        if not page.unit.outer:
            self._look_ahead(page)
        torch.accelerator.current_stream(self.pager.device).wait_event(slot.ready)
        return slot

    def leave(self, slot: Slot) -> None:
        """End a turn: what was launched so far may read the slot, what comes later does not."""
        self._users[slot.index] -= 1
        slot.used[len(slot.used)] = self._now()

    def close(self) -> None:
        """Join the side stream: a graph whose streams have not come together is invalid."""
        # an invalid capture is reported where it ends, by its own error
        with contextlib.suppress(RuntimeError):
            torch.accelerator.current_stream(self.pager.device).wait_event(self.stream.record_event())
        self._slots.clear()
        self._at.clear()

    def _now(self) -> Any:
        return torch.accelerator.current_stream(self.pager.device).record_event()

    def _look_ahead(self, page: Page) -> None:
        last, here = self.pager.order.note(page), page
        for _ in range(self.pager.slots.count - 1):
            guess = self.pager.order.foresee(last, here)
            if guess is None or guess.gone or self.pager.homes.pinned(guess.unit) is None:
                return
            if guess.unit.index not in self._at:
                slot = self._spare()
                if slot is None:
                    return
                self._fill(guess, slot)
                self._ahead.add(guess.unit.index)
            last, here = here.unit.index, guess

    def _claim(self, nbytes: int) -> Slot:
        slot = self._spare()
        if slot is None or slot.buffer.numel() < nbytes:
            # a guess that was wrong gives way
            free = (s for s in self._slots if not self._users[s.index] and s.buffer.numel() >= nbytes)
            slot = next(free, None) or self._add(max(nbytes, self.pager.slots.nbytes))
        return slot

    def _spare(self) -> Slot | None:
        """A slot that is in nobody's turn, and not waiting for one."""
        for slot in self._slots:
            waits = slot.page is not None and slot.page.unit.index in self._ahead
            if not self._users[slot.index] and not waits:
                return slot
        return self._add(self.pager.slots.nbytes) if len(self._slots) < self.pager.slots.count else None

    def _add(self, nbytes: int) -> Slot:
        slot = Slot(len(self._slots), nbytes, self.pager.device)
        # it may have been used before, for something else in the same graph
        slot.used[0] = self._now()
        self._slots.append(slot)
        self._users[slot.index] = 0
        return slot

    def _fill(self, page: Page, slot: Slot) -> None:
        source = self.pager.homes.pinned(page.unit)
        if source is None:
            raise PagingError(
                f"the page {page.unit.name!r} is on disk or in unpinned memory and cannot be captured in a graph",
                hint="map it to the GPU or the CPU, or capture around it: tuckaway.paging.CapturedStep",
            )
        if slot.page is not None:
            self._at.pop(slot.page.unit.index, None)
            self._ahead.discard(slot.page.unit.index)
        for event in slot.used.values():
            self.stream.wait_event(event)
        slot.used = {}
        with self.stream:
            slot.buffer[: source.numel()].copy_(source, non_blocking=True)
            slot.ready = self.stream.record_event()
        slot.page = page
        self._at[page.unit.index] = slot
