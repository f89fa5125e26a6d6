from __future__ import annotations

import fcntl
import os

import pytest
import torch

from tuckaway import files
from tuckaway.errors import ChecksumError, StoreError
from tuckaway.paging import reading as module
from tuckaway.paging import store as store_module
from tuckaway.paging.arena import host_memory
from tuckaway.paging.page import EXTENT, PageLayout
from tuckaway.paging.store import Store

LAYOUT = PageLayout(
    [
        (("a", ""), (EXTENT + 10,), torch.uint8),
        (("b", ""), (2 * EXTENT,), torch.uint8),
        (("c", ""), (9,), torch.uint8),
    ]
)


@pytest.fixture
def page():
    return torch.randint(0, 256, (LAYOUT.nbytes,), dtype=torch.uint8)


@pytest.fixture
def store(tmp_path, page, monkeypatch):
    """Two equal pages in four cells each."""
    monkeypatch.setattr(store_module, "CELL", EXTENT)
    store = Store.open_or_create(tmp_path, [LAYOUT] * 2, "model")
    for item in LAYOUT.items:
        page[item.offset + item.nbytes : item.offset + item.nbytes + (-item.nbytes) % 256] = 0
        for index in (0, 1):
            store.write(index, item.offset, item.view(page))
    store.commit()
    yield store
    store.close()


@pytest.fixture
def ways(monkeypatch):
    """How each read went: around the page cache or through it, and its size."""
    seen: list[tuple[bool, int]] = []
    read = files.read_at

    def watching(fd, view, offset, path=None):
        direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        seen.append((direct, len(view)))
        return read(fd, view, offset, path)

    monkeypatch.setattr(files, "read_at", watching)
    return seen


def read_all(store, index, page, memory=None):
    memory = host_memory(LAYOUT.extent) if memory is None else memory
    memory.fill_(1)
    for number, (start, _) in enumerate(store.reader.cells(index)):
        store.reader.read(index, number, memory[start:])
    assert torch.equal(memory[: LAYOUT.nbytes], page)


@pytest.mark.parametrize("direct", [True, False])
def test_cells_are_read_around_the_page_cache_or_through_it(store, page, ways, direct):
    if direct and store.reader._direct_fd < 0:
        pytest.skip("this file system has no O_DIRECT")
    store.reader.direct = direct
    read_all(store, 1, page)
    assert len(ways) == len(store.reader.cells(1)) == 4
    assert {way for way, _ in ways} == {direct}
    assert ways[-1][1] == (EXTENT if direct else LAYOUT.nbytes - 3 * EXTENT)


@pytest.mark.parametrize("held", [True, False])
def test_what_the_page_cache_holds_decides(store, page, ways, held, monkeypatch):
    monkeypatch.setattr(store.reader._cache, "holds", lambda offset, nbytes: held)
    read_all(store, 0, page)
    assert {way for way, _ in ways} == {not held and store.reader._direct_fd >= 0}


def test_memory_that_is_not_aligned_or_too_short_is_read_into_all_the_same(store, page, ways):
    store.reader.direct = True
    read_all(store, 0, page, host_memory(LAYOUT.extent + 64)[64:])
    assert {way for way, _ in ways} == {False}
    ways.clear()
    read_all(store, 0, page, host_memory(LAYOUT.nbytes))
    assert not ways[-1][0]  # no room behind the last cell
    with pytest.raises(ValueError, match="does not fit"):
        store.reader.read(0, 0, host_memory(EXTENT - 1))


def test_a_file_system_that_refuses_is_read_through_the_cache(store, page, monkeypatch):
    read, refused = files.read_at, []

    def refusing(fd, view, offset, path=None):
        if fd == store.reader._direct_fd:
            refused.append(offset)
            error = StoreError("cannot read: Invalid argument")
            error.errno = 22
            raise error
        return read(fd, view, offset, path)

    store.reader.direct = True
    monkeypatch.setattr(files, "read_at", refusing)
    read_all(store, 0, page)
    assert len(refused) <= 1
    assert store.reader.direct is False or store.reader._direct_fd < 0


def test_where_there_is_no_direct_reading_it_is_not_tried(monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT")
    assert module._around_the_cache(0, []) == -1


def test_every_flipped_byte_is_found_whatever_is_read(tmp_path, store, page):
    """Padding included. Cells that were read before the damage are checked again, because the file changed."""
    read_all(store, 0, page)
    path = tmp_path / "pages.bin"
    sound = path.read_bytes()
    for byte in range(0, LAYOUT.nbytes, 97):
        with path.open("r+b") as file:
            file.seek(byte)
            file.write(bytes([sound[byte] ^ 16]))
        os.utime(path, ns=(byte + 1, byte + 1))  # a clock too coarse would hide the change
        store.reader.refresh()
        with pytest.raises(ChecksumError, match="changed on disk"):
            store.reader.read(0, byte // EXTENT, host_memory(EXTENT))
        with path.open("r+b") as file:
            file.write(sound)


def test_ranges_are_checked_by_whole_cells_the_first_time(tmp_path, store, page):
    path = tmp_path / "pages.bin"
    for offset, nbytes in ((0, 1), (EXTENT - 1, 2), (5, 3 * EXTENT), (100, 0), (LAYOUT.nbytes - 1, 1)):
        out = torch.full((nbytes,), 3, dtype=torch.uint8)
        store.reader.read_range(0, offset, out)
        assert torch.equal(out, page[offset : offset + nbytes])
    data = bytearray(path.read_bytes())
    data[LAYOUT.extent + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match="'a'"):
        store.reader.read_range(1, 500, torch.empty(10, dtype=torch.uint8))


def test_a_closed_reader_says_so(store):
    reader = store.reader
    reader.close()
    reader.close()
    with pytest.raises(StoreError, match="closed"):
        reader.read(0, 0, host_memory(EXTENT))
    with pytest.raises(StoreError, match="closed"):
        reader.refresh()
