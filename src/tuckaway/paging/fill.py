"""A page on its way into a slot, in pieces that threads bring: :class:`Fill`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

__all__ = ["Fill"]


class Fill:
    """What one slot is being filled with. It is done when no piece of it can touch the slot any more.

    Any thread may ask; :meth:`result` raises what went wrong in a piece, with that thread's traceback.
    """

    __slots__ = ("_error", "_future", "_left", "_lock", "cancelled")

    def __init__(self) -> None:
        self.cancelled = False
        self._future: Future[None] = Future()
        self._error: BaseException | None = None
        self._left = 0
        self._lock = threading.Lock()

    def expect(self, pieces: int) -> None:
        """Say how many times :meth:`piece` will be called."""
        self._left = pieces

    @property
    def wanted(self) -> bool:
        """Whether what the pieces bring is of any use still."""
        return not self.cancelled and self._error is None

    def piece(self, work: Callable[[], None], last: Callable[[], None] | None = None) -> None:
        """Do a piece's work, which asks whether it is :attr:`wanted`; the last to end calls ``last`` first."""
        try:
            work()
        except BaseException as error:
            self._error = error
        with self._lock:
            self._left -= 1
            ended = self._left == 0
        if ended:
            self.end(last)

    def end(self, last: Callable[[], None] | None = None) -> None:
        """Be done, after ``last``, which is left out when there was an error or nobody wants the page."""
        try:
            if last is not None and self.wanted:
                last()
        except BaseException as error:
            self._error = error
        if self._error is not None:
            self._future.set_exception(self._error)
        else:
            self._future.set_result(None)

    def spoil(self, error: BaseException) -> None:
        """Note an error of a piece that still has something to do."""
        self._error = error

    def fail(self, error: BaseException) -> None:
        """Be done with an error."""
        self._error = error
        self.end()

    def cancel(self) -> None:
        """Say that nobody wants it any more; pieces that are under way end."""
        self.cancelled = True

    def done(self) -> bool:
        """Whether it is over, well or not."""
        return self._future.done()

    @property
    def failed(self) -> bool:
        """Whether it is over, with an error."""
        return self._error is not None and self._future.done()

    def result(self) -> None:
        """Wait for the end.

        Raises:
            BaseException: what went wrong.
        """
        self._future.result()

    def settle(self) -> None:
        """Wait for the end, whatever it is."""
        self._future.exception()

    def when_done(self, then: Callable[[], None]) -> None:
        """Call ``then`` at the end, in the thread that ends it, or now."""
        self._future.add_done_callback(lambda _: then())
