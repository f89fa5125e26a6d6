from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading

import psutil
import pytest

from tuckaway import files
from tuckaway.errors import StoreError
from tuckaway.files import atomic


def test_a_file_appears_at_its_commit(tmp_path):
    path = tmp_path / "x"
    with files.AtomicFile(path) as file:
        file.write(b"hello ")
        file.write(b"world")
        file.write_at(0, b"H")
        assert not path.exists()
        file.commit()
    assert path.read_bytes() == b"Hello world"
    assert os.listdir(tmp_path) == ["x"]


def test_what_is_not_committed_leaves_nothing(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def use():
        with files.AtomicFile(path, 100) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_failing_sync_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_failing_reservation_leaves_nothing(tmp_path):
    with pytest.raises(StoreError):
        files.AtomicFile(tmp_path / "x", 1 << 62)
    assert os.listdir(tmp_path) == []


def test_a_closed_file_cannot_be_written(tmp_path):
    with files.AtomicFile(tmp_path / "x") as file:
        file.finish()
        file.finish()
        with pytest.raises(StoreError):
            file.write(b"late")


def test_names_as_long_as_the_system_allows(tmp_path):
    files.write_atomically(tmp_path / ("é" * 127), b"1")
    assert len(os.listdir(tmp_path)) == 1


def test_threads_that_write_one_name_do_not_meet(tmp_path):
    path = tmp_path / "x"
    contents = [bytes([65 + i]) * 10_000 for i in range(8)]

    def write(content):
        for _ in range(5):
            files.write_atomically(path, content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["x"]


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def temp_name(pid: int, host: str = atomic._HOST) -> str:
    return f".model.safetensors.{host}-{pid}-0123456789ab.tmp"


def test_reap_removes_what_a_dead_process_left_and_nothing_else(tmp_path):
    dead = dead_process()
    stale = tmp_path / temp_name(dead)
    kept = [temp_name(dead, "ffffffff"), ".x.tmp", "model.safetensors", "notes.tmp"]
    for name in [stale.name, *kept]:
        (tmp_path / name).write_bytes(b"x")
    with files.AtomicFile(tmp_path / "mine"):
        own = tmp_path / temp_name(os.getpid())  # could not be removed when it was discarded
        own.write_bytes(b"x")
        assert sorted(files.reap(tmp_path)) == sorted([stale, own])
        assert len(os.listdir(tmp_path)) == len(kept) + 1
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_reap_leaves_what_somebody_holds_a_lock_on(tmp_path):
    # as in another container of the same host name, whose process numbers are not ours
    fcntl = pytest.importorskip("fcntl")
    held = tmp_path / temp_name(dead_process())
    with held.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        opened = psutil.Process().num_fds()
        assert files.reap(tmp_path) == ()
        assert psutil.Process().num_fds() == opened
    assert files.reap(tmp_path) == (held,)
    assert psutil.Process().num_fds() == opened - 1


def test_reap_of_no_folder(tmp_path):
    with pytest.raises(StoreError):
        files.reap(tmp_path / "missing")


def test_what_ended_is_remembered_no_longer(tmp_path):
    before = set(atomic._in_use)
    with files.AtomicFile(tmp_path / "x") as file:
        assert atomic._in_use == {*before, file.temp}
        assert not atomic._is_unlocked(file.temp)
        file.commit()
        assert atomic._in_use == before
    with files.AtomicFile(tmp_path / "y"):
        pass
    assert atomic._in_use == before


def test_a_temp_in_use_stays_where_there_are_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr("tuckaway.files.lock._HAS_FLOCK", False)
    with files.AtomicFile(tmp_path / "x") as file:
        assert files.reap(tmp_path) == ()
        assert file.temp.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_reap_does_not_wait_for_a_pipe(tmp_path):
    pipe = tmp_path / temp_name(dead_process())
    os.mkfifo(pipe)
    assert files.reap(tmp_path) == (pipe,)


def test_a_commit_syncs_the_file_and_then_its_folder(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(stat.S_ISDIR(os.fstat(fd).st_mode)), fsync(fd))
    )
    files.write_atomically(tmp_path / "x", b"1")
    assert synced == [False, True]
    with files.AtomicFile(tmp_path / "x") as file:
        file.commit(sync=False)
    assert synced == [False, True, False]
