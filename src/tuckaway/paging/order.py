"""Which page comes next: learned from what came, in this thread, last time. :class:`Order`."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from tuckaway.paging.binding import Page

__all__ = ["Order"]


class Order:
    """A page follows what followed it, and the page before it, last time; until something was seen, the model's order.

    Where that was wrong last time nothing is expected, until it would have been right once: experts that a router
    chooses anew for every token cannot be foreseen, and to bring the wrong one costs as much as the right one.

    Args:
        pages: those that take turns, in the model's order.
    """

    def __init__(self, pages: Sequence[Page]) -> None:
        self._next = {page.unit.index: pages[(i + 1) % len(pages)] for i, page in enumerate(pages)}
        self._after: dict[tuple[int, int], Page] = {}
        self._wrong: set[tuple[int | None, int]] = set()
        self._ends: set[tuple[int | None, int]] = set()
        self._local = threading.local()

    @property
    def _last_two(self) -> tuple[int | None, int | None]:
        return getattr(self._local, "last_two", (None, None))

    @property
    def last(self) -> int | None:
        """Index of the page that had the last turn in this thread."""
        return self._last_two[1]

    def begin(self) -> None:
        """Note that a forward of the whole model begins in this thread."""
        self._local.first = True

    def end(self) -> None:
        """Note that it ended."""
        before, last = self._last_two
        if last is not None and not getattr(self._local, "first", True):
            self._ends.add((before, last))

    def note(self, page: Page) -> int | None:
        """Learn that a page has its turn, and return the index of the page before it."""
        before, last = self._last_two
        if last is not None:
            known = self._next.get(last) if before is None else self._after.get((before, last))
            if known is None or known is page:
                self._wrong.discard((before, last))
            else:
                self._wrong.add((before, last))
            self._next[last] = page
            if before is not None:
                self._after[before, last] = page
            if not getattr(self._local, "first", False):
                self._ends.discard((before, last))
        self._local.last_two = (last, page.unit.index)
        self._local.first = False
        return last

    def _guess(self, before: int | None, here: int) -> Page:
        return self._next[here] if before is None else self._after.get((before, here), self._next[here])

    def guess(self, before: int | None, here: Page) -> Page | None:
        """Return what is expected after ``here`` when the page of index ``before`` came before it."""
        index = here.unit.index
        return None if (before, index) in self._wrong else self._guess(before, index)

    def foresee(self, before: int | None, here: Page) -> Page | None:
        """Return what is expected in the same forward; None where one ended last time."""
        return None if (before, here.unit.index) in self._ends else self.guess(before, here)
