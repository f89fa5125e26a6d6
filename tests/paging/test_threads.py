from __future__ import annotations

import gc
import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from interrupting import interrupted_at, wait_until
from tuckaway.paging.threads import Threads, is_reading_thread, reading_thread_count


def test_what_is_submitted_is_done_by_the_threads():
    done: queue.SimpleQueue[tuple[int, bool]] = queue.SimpleQueue()
    threads = Threads(3)
    for number in range(100):
        threads.submit(lambda number=number: done.put((number, is_reading_thread())))
    assert {done.get() for _ in range(100)} == {(number, True) for number in range(100)}
    assert not is_reading_thread()
    threads.close()
    threads.close()
    with pytest.raises(RuntimeError, match="were ended"):
        threads.submit(print)


def test_an_interrupted_start_leaves_no_thread():
    before = set(threading.enumerate())
    numbers = []
    for moment in interrupted_at(lambda: Threads(2).close()):
        numbers.append(moment.number)
        gc.collect()
        wait_until(lambda: set(threading.enumerate()) <= before)
    assert len(numbers) > 10


def test_threads_that_cannot_be_started_are_told_of(monkeypatch):
    before, start = set(threading.enumerate()), threading.Thread.start

    def second_fails(thread):
        if thread.name.endswith("_1"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", second_fails)
    with pytest.raises(RuntimeError, match="can't start"):
        Threads(3)
    gc.collect()
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_one_thread_keeps_the_order():
    done, threads = [], Threads(1)
    for number in range(50):
        threads.submit(lambda number=number: done.append(number))
    ended = threading.Event()
    threads.submit(ended.set)
    ended.wait()
    assert done == list(range(50))
    threads.close()


def test_an_error_is_logged_and_the_thread_goes_on(caplog):
    threads, ended = Threads(1), threading.Event()
    threads.submit(lambda: 1 / 0)
    threads.submit(ended.set)
    assert ended.wait(10)
    threads.close()
    assert "ZeroDivisionError" in caplog.text


def test_they_end_with_their_owner():
    before = set(threading.enumerate())
    threads = Threads(4)
    assert set(threading.enumerate()) > before
    del threads
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_closing_from_one_of_them_does_not_wait_for_itself():
    threads, ended = Threads(2), threading.Event()
    threads.submit(lambda: (threads.close(), ended.set()))
    assert ended.wait(10)


def test_what_was_not_begun_is_left_out_at_the_end():
    threads, gate, done = Threads(1), threading.Event(), []
    begun = threading.Event()
    threads.submit(lambda: (begun.set(), gate.wait(10)))
    threads.submit(lambda: done.append(1))
    begun.wait()
    closing = threading.Thread(target=threads.close)
    closing.start()
    gate.set()
    closing.join()
    assert done == [] or done == [1]


def test_the_interpreter_ends_with_threads_at_work():
    root = Path(__file__).parents[2]
    code = f"""
import sys; sys.path[:0] = [{str(root / "src")!r}, {str(root / "kernels")!r}]
import time
from tuckaway.paging.threads import Threads
threads = Threads(4)
for _ in range(8):
    threads.submit(lambda: time.sleep(0.05))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_there_are_a_few():
    assert 2 <= reading_thread_count() <= 14
