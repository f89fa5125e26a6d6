from __future__ import annotations

import errno
import mmap
import os
import resource
import shutil
import stat
from pathlib import Path

import psutil
import pytest
import torch

from interrupting import interrupted_at
from tuckaway import files
from tuckaway.errors import StoreError, StoreFull


@pytest.fixture
def opened(tmp_path):
    fd = os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_what_is_written_at_an_offset_is_read_there(opened):
    assert files.write_at(opened, b"abc", 5) == 3
    assert files.write_at(opened, memoryview(b"").cast("B"), 0) == 0
    view = bytearray(8)
    assert files.read_at(opened, memoryview(view), 0) == 8
    assert bytes(view) == b"\0" * 5 + b"abc"


def test_reading_at_the_end_returns_what_there_is(opened):
    files.write_at(opened, b"abc", 0)
    view = bytearray(b"...")
    assert files.read_at(opened, memoryview(view), 2) == 1
    assert bytes(view) == b"c.."
    assert files.read_at(opened, memoryview(view), 99) == 0


def test_short_writes_and_reads_are_continued(opened, monkeypatch):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:2], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:3]], offset))
    files.write_at(opened, b"0123456789", 0)
    view = bytearray(10)
    assert files.read_at(opened, memoryview(view), 0) == 10
    assert bytes(view) == b"0123456789"


def test_where_there_is_no_pread_the_position_is_set(opened, monkeypatch):
    for name in ("pwrite", "preadv", "readv"):
        monkeypatch.delattr(os, name)
    files.write_at(opened, b"0123", 2)
    view = bytearray(3)
    assert files.read_at(opened, memoryview(view), 3) == 3
    assert bytes(view) == b"123"


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, StoreFull), (errno.EDQUOT, StoreFull), (errno.EIO, StoreError)]
)
def test_errors_are_typed_and_keep_their_number(opened, monkeypatch, number, kind):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(StoreError, match=r"cannot write.*here") as caught:
        files.write_at(opened, b"x", 0, "here")
    assert type(caught.value) is kind
    assert caught.value.errno == number


def test_reserving_takes_the_blocks(opened):
    files.reserve(opened, 1 << 20)
    status = os.fstat(opened)
    assert status.st_size == 1 << 20
    assert status.st_blocks * 512 >= 1 << 20
    files.reserve(opened, 0)


def test_reserving_beyond_a_limit_is_store_full(opened):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(StoreFull):
            files.reserve(opened, 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_system_without_reservations_is_asked_for_its_free_space(opened, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    files.reserve(opened, 100, tmp_path / "data")
    assert os.fstat(opened).st_size == 100
    with pytest.raises(StoreFull, match="are free"):
        files.reserve(opened, 1 << 60, tmp_path / "data")


def test_what_refuses_a_reservation_for_another_reason_is_not_asked_again():
    """A pipe has no blocks to reserve; of its size the system would say something else."""
    ours, theirs = os.pipe()
    with pytest.raises(StoreError, match="reserve 100 bytes") as caught:
        files.reserve(theirs, 100)
    assert caught.value.errno == errno.ESPIPE
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EBADF])
def test_a_disk_that_fails_at_a_reservation_gets_no_size(opened, tmp_path, monkeypatch, number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", fails)
    with pytest.raises(StoreError) as caught:
        files.reserve(opened, 100, tmp_path / "data")
    assert caught.value.errno == number
    assert os.fstat(opened).st_size == 0


def test_require_space(tmp_path):
    files.require_space(tmp_path, 1)
    with pytest.raises(StoreFull, match=r"1,152,921,504,606,846,976 bytes .* free some space"):
        files.require_space(tmp_path, 1 << 60)
    with pytest.raises(StoreError):
        files.require_space(tmp_path / "missing", 1)


def test_folders_and_names(tmp_path: Path):
    folder = files.make_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    (folder / "x").write_text("x")
    files.replace(folder / "x", folder / "y")
    files.sync_folder(folder)
    assert not files.remove_folder(folder)
    assert files.remove(folder / "y")
    assert not files.remove(folder / "y")
    assert files.remove_folder(folder)
    with pytest.raises(StoreError):
        files.replace(folder / "x", folder / "y")
    with pytest.raises(StoreError):
        files.sync_folder(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        files.make_folder(tmp_path / "file")
    with pytest.raises(StoreError):
        files.remove(tmp_path / "a")


def test_a_folder_that_cannot_be_synced_is_let_be_but_a_failing_disk_is_not(tmp_path, monkeypatch):
    def fail(number):
        def fsync(_):
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", fail(errno.EINVAL))
    files.sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", fail(errno.EIO))
    with pytest.raises(StoreError):
        files.sync_folder(tmp_path)


def test_new_files_have_ordinary_permissions(tmp_path):
    umask = os.umask(0o022)
    try:
        files.write_atomically(tmp_path / "x", b"")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(os.stat(tmp_path / "x").st_mode) == 0o644


def test_a_forgotten_file_is_read_again(tmp_path):
    path = tmp_path / "file"
    files.write_atomically(path, b"x" * 10_000)
    files.forget(path)
    assert path.read_bytes() == b"x" * 10_000
    with pytest.raises(StoreError, match="cannot open it"):
        files.forget(tmp_path / "missing")


def test_no_call_moves_more_than_a_gibibyte(opened, monkeypatch):
    moved: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: moved.append((at, len(data))) or len(data))
    monkeypatch.setattr(
        os, "preadv", lambda fd, views, at: moved.append((at, len(views[0]))) or len(views[0])
    )
    with mmap.mmap(-1, (1 << 30) + 5) as memory:  # never touched: it takes no memory
        assert files.write_at(opened, memory, 7) == len(memory)
        with memoryview(memory) as view:
            assert files.read_at(opened, view, 7) == len(memory)
    assert moved == [(7, 1 << 30), ((1 << 30) + 7, 5)] * 2


def test_short_calls_without_pread_are_continued(opened, monkeypatch):
    for name in ("pwrite", "preadv", "readv"):
        monkeypatch.delattr(os, name)
    read, write, asked = os.read, os.write, []
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:2]))
        patch.setattr(os, "read", lambda fd, count: read(fd, min(count, 3)))
        files.write_at(opened, b"0123456789", 4)
        view = bytearray(8)
        assert files.read_at(opened, memoryview(view), 5) == 8
        assert bytes(view) == b"12345678"
    files.reserve(opened, 5 << 20)
    monkeypatch.setattr(os, "read", lambda fd, count: asked.append(count) or read(fd, count))
    assert files.read_at(opened, memoryview(bytearray(5 << 20)), 0) == 5 << 20
    assert asked == [4 << 20, 1 << 20]


def test_a_buffer_of_no_element_is_written_as_nothing(opened):
    assert files.write_at(opened, torch.empty(0, 3).numpy(), 5) == 0
    assert os.fstat(opened).st_size == 0


def test_what_is_opened_for_a_moment_is_closed(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomically(path, b"x")
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *what: advised.append(what))
    before = psutil.Process().num_fds()
    files.forget(path)
    files.sync_folder(tmp_path)
    with pytest.raises(StoreError, match="sync the folder"):
        files.sync_folder(path)
    assert psutil.Process().num_fds() == before
    assert advised == [(0, 0, os.POSIX_FADV_DONTNEED)]


def test_the_last_byte_of_a_disk_may_be_used(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    files.require_space(tmp_path, 100)
    with pytest.raises(StoreFull, match="101 bytes are to be written and 100 are free"):
        files.require_space(tmp_path, 101)


def test_a_folder_is_made_once_and_listed_in_order(tmp_path):
    assert files.make_folder(str(tmp_path / "a")) == files.make_folder(tmp_path / "a") == tmp_path / "a"
    for name in ("c", "a", "b"):
        (tmp_path / "a" / name).touch()
    assert files.names_in(tmp_path / "a") == ["a", "b", "c"]


def test_descriptors_are_held_or_closed_whatever_interrupts(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"x")
    before = len(os.listdir("/proc/self/fd"))

    def work():
        held: list[int] = []
        lists.append(held)
        for _ in range(2):
            files.open_held(held, path, os.O_RDONLY)
        assert os.read(held[0], 9) == b"x"
        files.close_held(held)
        assert held == []

    lists, numbers = [], []
    for moment in interrupted_at(work):
        numbers.append(moment.number)
        held = lists[-1]
        for fd in held:
            os.fstat(fd)
        assert len(os.listdir("/proc/self/fd")) == before + len(held), moment.where
        files.close_held(held)
    assert len(numbers) > 3
    work()


def test_a_descriptor_that_cannot_be_closed_is_let_go_of():
    ours, theirs = os.pipe()
    os.close(ours)
    held = [theirs, ours]
    files.close_held(held)
    assert held == []
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(theirs)
