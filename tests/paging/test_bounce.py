"""Disk pages on their way through pinned pieces, where there is no GPU: copies take effect when they are launched."""

from __future__ import annotations

import threading

import pytest
import torch

from paging_models import make, page, specs_of
from tuckaway.errors import StoreError
from tuckaway.paging import PageHomes, paging_of, plan_pages
from tuckaway.paging import store as store_module
from tuckaway.paging import transfer as module
from tuckaway.paging.bounce import Bounces, Run
from tuckaway.paging.page import EXTENT
from tuckaway.paging.slots import Slot
from tuckaway.paging.transfer import Transfer

CPU = torch.device("cpu")


class Event:
    """As a device's event: passed or not."""

    def __init__(self, passed=True):
        self.passed, self.waited, self.recorded = passed, False, 0

    def query(self):
        return self.passed

    def synchronize(self):
        self.waited = True

    def record(self, stream):
        self.recorded += 1


class Stream:
    def wait_event(self, event): ...

    def record_event(self):
        return Event()

    def synchronize(self): ...

    def __enter__(self): ...

    def __exit__(self, *_): ...


def test_a_bounce_is_free_when_its_copy_is_over():
    bounces = Bounces(2, 8192, CPU)
    first, second = bounces.take(), bounces.take()
    assert first.memory.numel() == 8192
    assert first.memory.data_ptr() % 4096 == second.memory.data_ptr() % 4096 == 0
    assert first.memory.data_ptr() != second.memory.data_ptr()
    taken = []
    waiting = threading.Thread(target=lambda: taken.append(bounces.take()))
    waiting.start()
    first.copied, second.copied = Event(True), Event(False)
    bounces.give_back(second)
    waiting.join()
    assert taken == [second]
    assert second.copied.waited
    bounces.give_back(first)
    bounces.take()
    assert not first.copied.waited
    bounces.close()


def test_a_run_takes_one_bounce_and_gives_it_back():
    bounces = Bounces(1, 8192, CPU)
    run = Run(bounces, 3)
    memory = run.memory()
    assert run.memory() is memory
    assert [run.ends() for _ in range(3)] == [False, False, True]
    run.give_back()
    run.give_back()
    assert bounces.take().memory.data_ptr() == memory.data_ptr()
    Run(bounces, 1).give_back()  # nothing was read
    bounces.close()


@pytest.fixture
def transfer(tmp_path, monkeypatch):
    """Pages of some five cells, in runs of two, through three pieces."""
    monkeypatch.setattr(store_module, "CELL", EXTENT)
    monkeypatch.setattr(module, "_RUN_BYTES", 2 * EXTENT + 1)
    monkeypatch.setattr(module, "_RUNS", 3)
    monkeypatch.setattr(module.torch.accelerator, "synchronize", lambda *_: None)
    made = []

    def with_events(*args):
        bounces = Bounces(*args)
        made.append(bounces)
        for bounce in [bounces.take() for _ in range(args[0])]:
            bounce.copied = Event()
            bounces.give_back(bounce)
        return bounces

    monkeypatch.setattr(module, "Bounces", with_events)
    model = make()
    plan = plan_pages(model, specs_of(model), {"": "disk"}, execution_device="cpu")
    homes = PageHomes.create(plan, offload_folder=tmp_path)
    for name, parameter in model.named_parameters():
        homes.put(name, parameter)
    homes.commit()
    transfer = Transfer(homes, CPU)
    transfer.on_device, transfer._stream = True, Stream()
    transfer.wait = lambda slot: slot.fill.result()
    transfer.made = made
    yield transfer
    transfer.close()
    homes.close()


def check(transfer, unit, slot):
    want = torch.empty(unit.layout.nbytes, dtype=torch.uint8)
    transfer.homes.store.read(transfer.homes.number(unit), want)
    assert torch.equal(slot.buffer[: unit.layout.nbytes], want)


def all_are_free(transfer):
    bounces = transfer.made[0]
    assert bounces._free.qsize() == 3


def test_pages_come_through_the_pieces(transfer):
    units = transfer.homes.plan.pages
    slots = [Slot(i, max(u.layout.nbytes for u in units), CPU) for i in range(2)]
    for turn in range(30):
        unit, slot = units[turn % len(units)], slots[turn % 2]
        transfer.start(unit, slot)
        if turn % 3:
            transfer.wait(slot)
            check(transfer, unit, slot)
    for slot in slots:
        slot.fill.settle()
    assert len(transfer.made) == 1
    all_are_free(transfer)


@pytest.mark.parametrize("cell", [0, 1, 4])
def test_a_cell_that_cannot_be_read_leaves_no_piece_behind(transfer, monkeypatch, cell):
    unit = transfer.homes.plan.page_of("blocks.1.up.weight")
    slot = Slot(0, unit.layout.nbytes, CPU)
    reader = transfer.homes.store.reader
    read = reader.read
    monkeypatch.setattr(
        reader,
        "read",
        lambda index, number, out, **o: broken() if number == cell else read(index, number, out, **o),
    )

    def broken():
        raise StoreError("lost")

    for _ in range(5):
        transfer.start(unit, slot)
        with pytest.raises(StoreError, match="lost"):
            transfer.wait(slot)
        all_are_free(transfer)
    cell = -1
    transfer.start(unit, slot)
    transfer.wait(slot)


def test_fills_that_nobody_wants_leave_no_piece_behind(transfer):
    units = transfer.homes.plan.pages
    slot = Slot(0, max(u.layout.nbytes for u in units), CPU)
    for turn in range(100):
        transfer.start(units[turn % len(units)], slot)
    transfer.wait(slot)
    check(transfer, units[99 % len(units)], slot)
    all_are_free(transfer)


def test_a_page_of_the_model_is_as_large_as_it_is_meant_to_be(tmp_path):
    model = page(make(), {"": "disk"}, tmp_path)
    unit = paging_of(model).plan.page_of("blocks.1.up.weight")
    assert 4 * EXTENT < unit.layout.nbytes < 5 * EXTENT
