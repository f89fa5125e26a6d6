"""What systems other than this one do, and what this one refuses."""

from __future__ import annotations

import errno
import os
import runpy
import sys
from pathlib import Path

import pytest

from tuckaway import files
from tuckaway.errors import StoreError, StoreFull
from tuckaway.files import atomic, lock


def failing(number: int):
    def call(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return call


def test_a_failure_to_close_is_no_failure(tmp_path, monkeypatch):
    fd = os.open(tmp_path, os.O_RDONLY)
    real = os.close
    monkeypatch.setattr(os, "close", lambda fd: (real(fd), failing(errno.EIO)()))
    files.close(fd)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_what_the_system_does_not_say(tmp_path, monkeypatch):
    assert files.exists(tmp_path)
    assert not files.exists(tmp_path / "missing")
    assert files.names_in(tmp_path) == []
    monkeypatch.setattr(Path, "exists", failing(errno.EIO))
    with pytest.raises(StoreError, match="look for it") as caught:
        files.exists(tmp_path)
    assert caught.value.errno == errno.EIO
    with pytest.raises(StoreError, match="look at it"):
        files.status(-1, tmp_path)


@pytest.mark.parametrize("named", [True, False])
def test_room_is_asked_for_where_it_cannot_be_taken(tmp_path, monkeypatch, named):
    monkeypatch.delattr(os, "posix_fallocate")
    path = tmp_path / "data"
    with path.open("wb") as file:
        files.reserve(file.fileno(), 5000, path if named else None)
        assert path.stat().st_size == 5000
        if named:
            with pytest.raises(StoreFull, match="are free"):
                files.reserve(file.fileno(), 2**62, path)


def test_a_folder_is_not_synced_on_windows(tmp_path, monkeypatch):
    missing = os.fspath(tmp_path / "missing")
    with pytest.raises(StoreError):
        files.sync_folder(missing)
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        files.sync_folder(missing)


def test_without_flock_every_lock_is_granted(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    module = runpy.run_path(lock.__file__)
    assert module["try_lock"](-1)


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
@pytest.mark.parametrize(
    ("number", "answer"),
    [(errno.EWOULDBLOCK, False), (errno.EACCES, False), (errno.ENOLCK, True), (errno.EOPNOTSUPP, True)],
)
def test_what_flock_answers(monkeypatch, number, answer):
    monkeypatch.setattr(lock.fcntl, "flock", failing(number))
    assert lock.try_lock(0) is answer


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
def test_a_lock_that_fails_is_an_error_and_holds_nothing(tmp_path, monkeypatch):
    held = files.FolderLock(tmp_path / "lock")
    monkeypatch.setattr(lock.fcntl, "flock", failing(errno.EIO))
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    with pytest.raises(StoreError, match="lock it"):
        held.acquire()
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(StoreError, match="lock it"):
        files.AtomicFile(tmp_path / "file")
    assert os.listdir(tmp_path) in ([], ["lock"])
    held.release()


def test_a_temp_that_cannot_be_opened_is_left(tmp_path, monkeypatch):
    assert not atomic._is_unlocked(tmp_path / "missing")


def test_a_file_is_taken_out_of_the_page_cache_where_that_can_be_asked(tmp_path, monkeypatch):
    (tmp_path / "data").write_bytes(b"x" * 5000)
    files.forget(tmp_path / "data")
    with pytest.raises(StoreError, match="open it"):
        files.forget(tmp_path / "missing")
    monkeypatch.delattr(os, "posix_fadvise")
    files.forget(tmp_path / "missing")
