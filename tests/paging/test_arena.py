from __future__ import annotations

import threading

import pytest
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


def test_it_stays_pinned_while_a_graph_is_captured(monkeypatch):
    """Waiting for the device, as unpinning must, would invalidate the graph."""
    registered: set[int] = set()
    capturing = True
    monkeypatch.setattr(module.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(module, "_capturing", lambda: capturing)
    monkeypatch.setattr(module, "_register", lambda address, *_: registered.add(address) or True)
    monkeypatch.setattr(module, "_unregister", lambda addresses: registered.difference_update(addresses))
    closed, dropped = Arena(layouts(4096), pin=True), Arena(layouts(4096), pin=True)
    addresses = {closed.buffer.data_ptr(), dropped.buffer.data_ptr()}
    assert closed.pin()
    assert dropped.pin()
    closed.close()
    del dropped
    assert registered == addresses
    again = Arena(layouts(4096, 4096))
    assert again.buffer.data_ptr() not in addresses  # nobody else's memory yet
    capturing = False
    Arena(layouts(1))
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


def test_it_is_pinned_by_a_thread_beside_whoever_fills_it(monkeypatch):
    threads, gate = set(), threading.Event()
    monkeypatch.setattr(module, "PIN_STEP", 4096)
    monkeypatch.setattr(module.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(module, "_unregister", lambda addresses: None)

    def register(*_):
        gate.wait(10)
        threads.add(threading.current_thread().name)
        return True

    monkeypatch.setattr(module, "_register", register)
    arena = Arena(layouts(4096, 4096, 4096), pin=True)
    arena.start_pinning()
    arena.start_pinning()
    arena.page(0).fill_(1)
    assert not arena.pinned
    gate.set()
    assert arena.pin()
    assert threads == {"tuckaway-pin"}
    arena.close()


def test_what_goes_wrong_while_pinning_is_told_to_who_waits_for_it(monkeypatch):
    monkeypatch.setattr(module.torch.accelerator, "is_available", lambda: True)

    def register(*_):
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(module, "_register", register)
    arena = Arena(layouts(4096), pin=True)
    arena.start_pinning()
    with pytest.raises(RuntimeError, match="driver is gone"):
        arena.pin()
    arena.close()


def test_an_arena_that_is_closed_while_it_is_pinned_ends_the_thread(monkeypatch):
    monkeypatch.setattr(module, "PIN_STEP", 4096)
    monkeypatch.setattr(module.torch.accelerator, "is_available", lambda: True)
    registered, begun = [], threading.Event()
    monkeypatch.setattr(module, "_register", lambda a, *_: (begun.set(), registered.append(a)) and True)
    monkeypatch.setattr(module, "_unregister", lambda addresses: [registered.remove(a) for a in addresses])
    arena = Arena(layouts(*[4096] * 500), pin=True)
    arena.start_pinning()
    begun.wait(10)
    arena.close()
    assert registered == []
    assert "tuckaway-pin" not in {thread.name for thread in threading.enumerate()}


def test_the_warning_says_what_unpinned_memory_costs(monkeypatch, caplog):
    monkeypatch.setattr(module.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(module, "_register", lambda *_: False)
    arena = Arena(layouts(70_000_000), pin=True)
    with caplog.at_level("WARNING", logger="tuckaway"):
        arena.pin()
    assert "about 0.01 s instead of 0.00 s" in caplog.text
