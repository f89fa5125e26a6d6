from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading

import psutil
import pytest

from tuckaway import files
from tuckaway.errors import StoreBusy, StoreError

HOLD = """
import sys
from tuckaway.files import FolderLock
lock = FolderLock(sys.argv[1])
print(lock.acquire(), flush=True)
sys.stdin.read()
"""


def test_one_holder_at_a_time_and_no_file_afterwards(tmp_path):
    path = tmp_path / "lock"
    with files.FolderLock(path):
        other = files.FolderLock(path)
        assert not other.acquire()
        with pytest.raises(StoreBusy, match="another process uses this folder"), files.FolderLock(path):
            pass
        other.release()
        assert path.exists()
    assert os.listdir(tmp_path) == []
    with files.FolderLock(path) as lock:
        assert lock.acquire()
    lock.release()


def test_shared_holders_keep_an_exclusive_one_out(tmp_path):
    path = tmp_path / "lock"
    first, second, alone = files.FolderLock(path), files.FolderLock(path), files.FolderLock(path)
    assert first.acquire()
    assert not second.acquire(shared=True)
    assert first.acquire(shared=True)
    assert second.acquire(shared=True)
    assert not alone.acquire()
    first.release()
    assert path.exists()
    assert not alone.acquire()
    second.release()
    assert os.listdir(tmp_path) == []
    assert alone.acquire()
    alone.release()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(StoreError), files.FolderLock(tmp_path / "missing" / "lock"):
        pass


def test_a_killed_holder_is_forgotten(tmp_path):
    path = tmp_path / "lock"
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "True\n"
        lock = files.FolderLock(path)
        assert not lock.acquire()
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert lock.acquire()
        lock.release()


def test_many_threads_never_hold_it_together(tmp_path):
    path = tmp_path / "lock"
    inside: list[int] = []
    most: list[int] = []

    def work():
        for _ in range(100):
            lock = files.FolderLock(path)
            if lock.acquire():
                inside.append(1)
                most.append(len(inside))
                inside.pop()
                lock.release()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert os.listdir(tmp_path) == []


def test_where_there_are_no_locks_every_one_is_granted(tmp_path, monkeypatch):
    monkeypatch.setattr("tuckaway.files.lock._HAS_FLOCK", False)
    with files.FolderLock(tmp_path / "lock"):
        with files.FolderLock(tmp_path / "lock"):
            pass
        assert (tmp_path / "lock").exists()  # nobody knows who else has it


def test_a_lock_file_that_was_removed_is_made_again(tmp_path):
    path = tmp_path / "lock"
    first, second = files.FolderLock(path), files.FolderLock(path)
    umask = os.umask(0)
    try:
        assert first.acquire()
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    path.unlink()
    assert second.acquire()
    assert not first.acquire()
    first.release()
    assert path.exists()
    assert not files.FolderLock(path).acquire()
    path.unlink()
    assert second.acquire()
    assert path.exists()
    before = psutil.Process().num_fds()
    second.release()
    assert psutil.Process().num_fds() == before - 1
