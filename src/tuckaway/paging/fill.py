"""A page on its way into a slot, in pieces that threads bring: :class:`Fill`.

Ctrl-C reaches the main thread only, and there between any two calls. So the main thread holds no lock of a fill and
does none of its pieces; what it left half done (pieces that no thread was told of) threads do in its place.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

__all__ = ["Fill", "Submit"]

Submit = Callable[..., None]
"""Has threads make calls; raises RuntimeError when they were ended."""


class Fill:
    """What one slot is being filled with. It is done when no piece of it can touch the slot any more.

    Any thread may ask; :meth:`result` raises what went wrong in a piece, with that thread's traceback.

    Args:
        submit: whose threads do it.
        before: what the slot is being filled with still. It was cancelled, and ends before this one begins.
    """

    __slots__ = (
        "__weakref__",
        "_active",
        "_before",
        "_error",
        "_gate",
        "_last",
        "_lock",
        "_over",
        "_submit",
        "_todo",
        "cancelled",
    )

    def __init__(self, submit: Submit, before: Fill | None = None) -> None:
        self.cancelled = False
        self._submit = submit
        self._before = before
        self._todo: deque[Callable[[], None]] = deque()
        self._last: Callable[[], None] | None = None
        self._active = 0
        self._error: BaseException | None = None
        self._over = False
        self._lock = threading.Lock()
        self._gate = threading.Lock()
        self._gate.acquire()

    def begin(self, pieces: Iterable[Callable[[], None]], last: Callable[[], None] | None = None) -> None:
        """Have the threads do the pieces, and then ``last``.

        Args:
            pieces: each asks whether it is :attr:`wanted`, and is called in any case.
            last: left out when there was an error or nobody wants the page.

        Raises:
            RuntimeError: the threads were ended.
        """
        self._last = last
        self._todo = deque(pieces) or deque((_nothing,))
        self._submit(*[self._work] * len(self._todo))

    @property
    def wanted(self) -> bool:
        """Whether what the pieces bring is of any use still."""
        return not self.cancelled and self._error is None

    def spoil(self, error: BaseException) -> None:
        """Note an error of a piece that still has something to do."""
        self._error = error

    def fail(self, error: BaseException) -> None:
        """Be done with an error; no piece was begun."""
        self._error = error
        if self._before is not None:
            try:
                self._submit(self._finish)
                return
            except RuntimeError:
                pass  # the threads were ended, and what was before with them
        self._over = True
        self._gate.release()

    def cancel(self) -> None:
        """Say that nobody wants it any more; pieces that are under way end."""
        self.cancelled = True

    def done(self) -> bool:
        """Whether it is over, well or not."""
        return self._over

    @property
    def failed(self) -> bool:
        """Whether it is over, with an error."""
        return self._over and self._error is not None

    def result(self) -> None:
        """Wait for the end.

        Raises:
            BaseException: what went wrong.
        """
        with self._gate:
            pass
        try:
            if self._error is not None:
                raise self._error
        finally:
            del self  # or the error's traceback would refer to the error

    def settle(self) -> None:
        """Wait for the end, whatever it is."""
        if self._over:
            return
        try:
            # whoever began it may have been interrupted before the threads knew of all its pieces
            self._submit(self._finish)
        except RuntimeError:
            return  # they were ended, and nothing is touched any more
        with self._gate:
            pass

    # In the threads

    def _finish(self) -> None:
        """Do all pieces that nobody does."""
        while self._work():
            pass

    def _work(self) -> bool:
        """Do the next piece, and return whether there was one."""
        before = self._before
        if before is not None:
            before._finish()
            with before._gate:  # pieces of it that other threads are at
                pass
            self._before = None
        return self._next()

    def _next(self) -> bool:
        with self._lock:
            piece = self._todo.popleft() if self._todo else None
            if piece is None:
                if self._active == 0:
                    self._open()
                return False
            self._active += 1
        self._do(piece)
        with self._lock:
            self._active -= 1
            if self._active or self._todo:
                return True
            self._active = 1  # for what comes last
        if self._last is not None and self.wanted:
            self._do(self._last)
        with self._lock:
            self._active = 0
            self._open()
        return True

    def _do(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            self._error = error

    def _open(self) -> None:
        if not self._over:
            self._over = True
            self._gate.release()


def _nothing() -> None:
    """Be the piece of a page without bytes."""
