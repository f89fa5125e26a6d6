from __future__ import annotations

import torch

from tuckaway.paging import arena as module
from tuckaway.paging.arena import Arena, host_memory
from tuckaway.paging.page import PageLayout


def layouts(*sizes: int) -> list[PageLayout]:
    return [PageLayout([((f"t{i}", ""), (size,), torch.uint8)]) for i, size in enumerate(sizes)]


def test_pages_are_stretches_of_one_exact_allocation():
    arena = Arena(layouts(1, 0, 300, 256), pin=False)
    assert arena.nbytes == 3 * 4096
    assert arena.buffer.untyped_storage().nbytes() == arena.nbytes
    for index in range(4):
        arena.page(index).fill_(index + 1)
    assert [int(arena.page(i).sum()) for i in range(4)] == [256, 0, 3 * 512, 4 * 256]
    assert arena.page(0).data_ptr() % 4096 == 0


def test_views_outlive_the_arena():
    arena = Arena(layouts(512), pin=False)
    page = arena.page(0).fill_(7)
    arena.close()
    arena.close()
    del arena
    assert page.eq(7).all()


def test_memory_of_no_bytes():
    assert host_memory(0).shape == (0,)
    assert Arena([], pin=True).nbytes == 0


def test_it_is_pinned_piece_by_piece_and_let_go_of(monkeypatch):
    registered: dict[int, int] = {}
    monkeypatch.setattr(module.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(module, "_register", lambda a, n, _: registered.update({a: n}) or True)
    monkeypatch.setattr(module, "_unregister", lambda addresses: [registered.pop(a) for a in addresses])
    arena = Arena(layouts(4096, 5000, 1, 0, 9000, 3), pin=True)
    start = arena.buffer.data_ptr()
    assert arena.pin_step(4097)  # never part of a page
    assert not arena.pinned
    assert arena.pin_step(1)
    assert arena.pin()
    assert registered == {start: 3 * 4096, start + 3 * 4096: 4096, start + 4 * 4096: 4 * 4096}
    assert not arena.pin_step()
    arena.close()
    assert not registered


def test_memory_that_cannot_be_pinned_is_used_as_it_is(monkeypatch, caplog):
    monkeypatch.setattr(module.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(module, "_register", lambda *_: False)
    arena = Arena(layouts(2**21), pin=True)
    with caplog.at_level("WARNING", logger="tuckaway"):
        assert not arena.pin()
        assert not arena.pin()
    assert len(caplog.records) == 1
    assert "could not pin 2 MiB" in caplog.text
    arena.page(0).fill_(1)
