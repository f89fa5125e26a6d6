"""The threads that read pages: :class:`Threads`."""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable

__all__ = ["Threads", "is_reading_thread", "reading_thread_count"]

logger = logging.getLogger("tuckaway")

_NAME = "tuckaway-page"


def reading_thread_count() -> int:
    """How many threads read: most of the cores this process may use, 2 at least and 14 at most.

    The page cache gives 6, 15, 28 and 49 GB/s to 1, 4, 8 and 16 of them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return min(max(cores - 2, 2), 14)


def is_reading_thread() -> bool:
    """Tell whether the caller is one: it cannot wait for itself to end."""
    return threading.current_thread().name.startswith(_NAME)


class Threads:
    """Threads that do what is submitted, in order. A call costs a tenth of an executor's, which makes a future of it.

    They end when :meth:`close` is called, this object goes, or the interpreter ends; what was not begun is left out.

    Args:
        count: how many.

    Example:
        >>> done = queue.SimpleQueue()
        >>> threads = Threads(2)
        >>> threads.submit(lambda: done.put("read"))
        >>> done.get()
        'read'
        >>> threads.close()
    """

    def __init__(self, count: int) -> None:
        work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._work = work
        self._threads = [
            threading.Thread(target=_run, args=(work,), name=f"{_NAME}_{number}", daemon=True)
            for number in range(count)
        ]
        # daemons are not waited for by the interpreter, and must not be in a copy when it takes itself apart
        self._finalizer = weakref.finalize(self, _end, work, self._threads)
        self._closed = False
        self._lock = threading.Lock()
        # by a thread that Ctrl-C does not reach: Thread.start waits for an event, and an interrupt in that wait can
        # leave the event's lock taken, which the thread that was started would wait for to its end
        started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        _thread.start_new_thread(_start, (self._threads, started))
        if (error := started.get()) is not None:
            raise error

    def submit(self, *calls: Callable[[], object]) -> None:
        """Have the threads call, in this order and nothing in between; the calls should not raise.

        Raises:
            RuntimeError: the threads were ended.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the threads that read were ended")
            for call in calls:
                self._work.put(call)

    def close(self) -> None:
        """End the threads and wait for what they are at. Twice does no harm."""
        with self._lock:
            self._closed = True
        _end(self._work, self._threads)
        self._finalizer.detach()


def _start(threads: list[threading.Thread], started: queue.SimpleQueue[BaseException | None]) -> None:
    error: BaseException | None = None
    try:
        for thread in threads:
            thread.start()
    except BaseException as caught:
        error = caught
    started.put(error)


def _run(work: queue.SimpleQueue[Callable[[], object] | None]) -> None:
    while (call := work.get()) is not None:
        try:
            call()
        except BaseException:
            logger.exception("a page could not be read, and nobody was told")
        del call  # or what it refers to would live until the next one


def _end(work: queue.SimpleQueue[Callable[[], object] | None], threads: list[threading.Thread]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            work.get_nowait()
    for _ in threads:
        work.put(None)
    current = threading.current_thread()
    for thread in threads:
        if thread is not current and thread.is_alive():
            thread.join()
