"""KeyboardInterrupt at every moment of a piece of work at which Python can deliver one.

Python looks for signals when a function begins or goes on, after a call has returned, and when a loop jumps back: so
between ``open()`` and the assignment of what it returned, but never between the ``__enter__`` of a lock and its
block. A tracer that raises at the n-th of these moments, for every n, finds what random signals find once in a
thousand tries.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dis import opmap
from types import FrameType
from typing import Any

import tuckaway

OURS = os.path.dirname(tuckaway.__file__) + os.sep

_LOOKS = frozenset(
    opmap[name]
    for name in ("RESUME", "CALL", "CALL_FUNCTION_EX", "CALL_KW", "JUMP_BACKWARD")
    if name in opmap
)
"""Instructions after which the interpreter looks for signals."""


class Moments:
    """Counts the moments of this thread's work, and raises KeyboardInterrupt at one of them.

    Args:
        number: of that one, from 0 on; ``None`` only counts.
        folders: whose files count.

    Attributes:
        seen: how many there were.
        where: file, line and function of the one at which it raised.
    """

    def __init__(self, number: int | None = None, folders: tuple[str, ...] = (OURS,)) -> None:
        self.number = number
        self.folders = folders
        self.seen = 0
        self.where = ""

    def __enter__(self) -> Moments:
        self._collects, self._before = gc.isenabled(), sys.gettrace()
        gc.disable()  # what an earlier piece of work left is not this one's
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        if self._collects:
            gc.enable()

    def _call(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(self.folders) or _in_finalizer(frame):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        code = frame.f_code.co_code
        last = code[frame.f_lasti]  # RESUME, unless it is a generator that is closed

        def instruction(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal last
            if event == "opcode":
                if last in _LOOKS:
                    self._moment(frame)
                last = code[frame.f_lasti]
            elif event == "exception":
                last = -1  # a call that raised has not returned
            return instruction

        return instruction

    def _moment(self, frame: FrameType) -> None:
        self.seen += 1
        if self.seen - 1 == self.number:
            code = frame.f_code
            self.where = (
                f"{code.co_filename}:{frame.f_lineno} in {code.co_qualname}, instruction {frame.f_lasti}"
            )
            raise KeyboardInterrupt(self.where)


def _in_finalizer(frame: FrameType | None) -> bool:
    """Whether an error raised here would be printed and dropped: Python tells nobody of one in ``__del__``."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def interrupted_at(
    work: Callable[[], object], *, every: int = 1, first: int = 0, **options: Any
) -> Iterator[Moments]:
    """Do the work again and again, interrupted at every moment from ``first`` on; yield after each interrupt."""
    for number in itertools.count(first, every):
        moment = Moments(number, **options)
        try:
            with moment:
                work()
        except KeyboardInterrupt:
            if not moment.where:
                raise
        if not moment.where:
            return
        yield moment


def interrupted_anew(
    make: Callable[[], Any], work: Callable[[Any], object], step: int
) -> Iterator[tuple[Any, Moments]]:
    """Interrupt the work on a thing made anew for each moment, every ``step``-th; yield the thing and the moment."""
    for number in itertools.count(0, step):
        made = make()
        moment = next(interrupted_at(lambda thing=made: work(thing), first=number), None)  # type: ignore[misc]
        if moment is None:
            return
        yield made, moment


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for other threads, as long as it takes: a test that waits forever ends by its timeout."""
    while not holds():
        time.sleep(0.001)
