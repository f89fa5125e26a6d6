from __future__ import annotations

import os

import pytest

from tuckaway.paging import residency as module
from tuckaway.paging.residency import PageCache


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(64 * 4096))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    yield fd
    os.close(fd)


def test_what_was_just_written_is_there_and_what_was_dropped_is_not(file):
    cache = PageCache(file, 64 * 4096)
    assert cache.holds(0, 64 * 4096)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    if cache.holds(0, 64 * 4096):
        pytest.skip("this system does not drop what it is told to")
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
    os.pread(file, 4 * 4096, 32 * 4096)
    assert cache.holds(32 * 4096, 4 * 4096)
    assert cache.holds(32 * 4096, 8 * 4096)  # half of it
    assert not cache.holds(0, 16 * 4096)
    cache.close()
    cache.close()
    assert cache.holds(0, 4096)  # nothing is known any more


def test_a_file_cut_short_harms_nobody(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(16 * 4096))
    with path.open("rb") as file:
        cache = PageCache(file.fileno(), 16 * 4096)
        os.truncate(path, 0)
        cache.holds(0, 16 * 4096)
        cache.close()


@pytest.mark.parametrize("broken", ["library", "empty", "offset"])
def test_where_nothing_is_known_all_is_taken_to_be_there(file, monkeypatch, broken):
    if broken == "library":
        monkeypatch.setattr(module, "_library", lambda: None)
    cache = PageCache(file, 0 if broken == "empty" else 64 * 4096)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    assert cache.holds(7 if broken == "offset" else 0, 4096)
    cache.close()
