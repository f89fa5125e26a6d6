from __future__ import annotations

import gc
import threading
import weakref

import pytest

from interrupting import interrupted_at
from tuckaway.paging.fill import Fill
from tuckaway.paging.threads import Threads


@pytest.fixture
def threads():
    threads = Threads(3)
    yield threads
    threads.close()


class ByHand:
    """Does what is submitted when it is told to."""

    def __init__(self):
        self.calls = []

    def submit(self, *calls):
        self.calls += calls

    def do(self, number=None):
        for _ in range(len(self.calls) if number is None else number):
            self.calls.pop(0)()


def test_the_last_piece_ends_it():
    hand, seen = ByHand(), []
    fill = Fill(hand.submit)
    fill.begin([lambda n=n: seen.append(n) for n in range(3)], lambda: seen.append("last"))
    for _ in range(3):
        assert not fill.done()
        hand.do(1)
    assert fill.done()
    fill.result()
    assert seen == [0, 1, 2, "last"]


def test_a_page_without_pieces_has_an_end():
    hand, seen = ByHand(), []
    fill = Fill(hand.submit)
    fill.begin([], lambda: seen.append("last"))
    hand.do()
    fill.result()
    assert seen == ["last"]


def test_an_error_ends_it_when_no_piece_is_under_way_any_more():
    hand, seen = ByHand(), []
    fill = Fill(hand.submit)

    def broken():
        raise OSError("broken")

    fill.begin([broken, lambda: None, lambda: None], lambda: seen.append("last"))
    hand.do(1)
    assert not fill.done()
    assert not fill.wanted
    hand.do(1)
    assert not fill.done()
    assert not fill.failed
    hand.do(1)
    assert fill.failed
    with pytest.raises(OSError, match="broken") as caught:
        fill.result()
    assert "broken" in [entry.name for entry in caught.traceback]
    assert seen == []
    fill.settle()


def test_an_error_at_the_end_is_told(threads):
    fill = Fill(threads.submit)
    fill.begin([], lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fill.result()


def test_an_error_that_was_told_is_no_garbage_in_a_cycle(threads):
    fill = Fill(threads.submit)
    fill.begin([lambda: 1 / 0])
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError):
            fill.result()
        gone = weakref.ref(fill)
        del fill
        assert gone() is None or threading.active_count() > 1
    finally:
        gc.enable()


def test_a_cancelled_one_is_not_wanted_and_has_no_end(threads):
    fill, seen = Fill(threads.submit), []
    fill.cancel()
    fill.begin([lambda: seen.append(fill.wanted) if fill.wanted else None], lambda: seen.append("last"))
    fill.result()
    assert seen == []


def test_one_that_follows_another_begins_when_that_has_ended():
    hand, seen = ByHand(), []
    first = Fill(hand.submit)
    first.begin([lambda n=n: seen.append(("first", n)) for n in range(2)])
    second = Fill(hand.submit, first)
    second.begin([lambda: seen.append("second")])
    hand.calls.reverse()  # whoever comes first does what must be before
    hand.do()
    assert seen == [("first", 0), ("first", 1), "second"]
    assert first.done()
    assert second.done()


def test_one_that_fails_behind_another_is_not_over_before_that():
    hand = ByHand()
    first = Fill(hand.submit)
    first.begin([lambda: None])
    second = Fill(hand.submit, first)
    second.fail(ValueError("no"))
    assert not second.done()
    hand.do()
    assert second.failed
    third = Fill(hand.submit)
    third.fail(ValueError("no"))
    assert third.failed


def test_what_the_threads_were_never_told_of_is_ended_by_who_waits(threads):
    """A main thread that was interrupted before, while or after it told them."""
    for told in range(4):
        seen: list[int] = []

        def submit(*calls, told=told):
            if len(calls) == 1:  # who waits
                threads.submit(*calls)
                return
            threads.submit(*calls[:told])
            raise KeyboardInterrupt

        fill = Fill(submit)
        with pytest.raises(KeyboardInterrupt):
            fill.begin([lambda n=n, seen=seen: seen.append(n) for n in range(3)])
        fill.cancel()
        fill.settle()
        assert fill.done()
        assert sorted(seen) == [0, 1, 2]


def test_an_interrupt_at_any_moment_leaves_one_that_ends(threads):
    fills = []

    def work():
        fill = Fill(threads.submit)
        fills.append(fill)
        fill.begin([lambda: None] * 3, lambda: None)
        fill.result()
        fill.settle()

    numbers = []
    for moment in interrupted_at(work):
        numbers.append(moment.number)
        for fill in fills:
            fill.cancel()
            fill.settle()
            assert fill.done()
    assert len(numbers) > 10


def test_nobody_waits_for_threads_that_were_ended():
    threads = Threads(1)
    fill = Fill(threads.submit)
    threads.close()
    with pytest.raises(RuntimeError, match="were ended"):
        fill.begin([lambda: None])
    fill.settle()


def test_many_threads_end_it_once():
    threads = Threads(8)
    for _ in range(50):
        fill, ends = Fill(threads.submit), []
        fill.begin([lambda: None] * 16, lambda ends=ends: ends.append(1))
        fill.result()
        assert ends == [1]
    threads.close()
