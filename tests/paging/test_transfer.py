from __future__ import annotations

import threading

import pytest
import torch

from paging_models import make, specs_of
from tuckaway.errors import PagingError
from tuckaway.paging import PageHomes, plan_pages
from tuckaway.paging.slots import Slot
from tuckaway.paging.transfer import Transfer


@pytest.fixture
def homes(tmp_path):
    model = make()
    plan = plan_pages(
        model, specs_of(model), {"": "disk", "norm": "cpu"}, execution_device="cpu", page_cpu=True
    )
    homes = PageHomes.create(plan, offload_folder=tmp_path)
    for name, parameter in model.named_parameters():
        homes.put(name, parameter)
    homes.commit()
    yield homes
    homes.close()


@pytest.fixture
def transfer(homes):
    transfer = Transfer(homes, torch.device("cpu"))
    yield transfer
    transfer.close()


def slot_for(homes):
    return Slot(0, homes.plan.slot_nbytes, torch.device("cpu"))


def content(homes, unit, slot):
    return {
        name: homes.plan.specs[name].build(unit.layout.components(name, slot.buffer)) for name in unit.tensors
    }


@pytest.mark.parametrize("path", ["blocks.0", "norm", "embedding"])
def test_a_slot_gets_the_bytes_of_the_page(homes, transfer, path):
    unit = homes.plan.page_of(f"{path}.weight") or homes.plan.page_of(f"{path}.up.weight")
    slot = slot_for(homes)
    transfer.start(unit, slot)
    transfer.wait(slot)
    for name, tensor in content(homes, unit, slot).items():
        assert torch.equal(tensor, make().get_parameter(name))


def test_the_last_page_asked_for_wins(homes, transfer):
    """A fill that nobody wants any more ends, or never begins, before the next one into the same slot."""
    pages = [homes.plan.page_of(f"blocks.{i}.up.weight") for i in range(5)]
    pages.append(homes.plan.page_of("norm.weight"))  # from memory, which is faster
    slot, resident = slot_for(homes), make()
    gate, read = threading.Event(), homes.store.reader.read

    def slowly(*args, **options):
        gate.wait(10)
        read(*args, **options)

    homes.store.reader.read = slowly
    for last in pages:
        gate.clear()
        for unit in (*pages, last):
            transfer.start(unit, slot)
        gate.set()
        transfer.wait(slot)
        for name, tensor in content(homes, last, slot).items():
            assert torch.equal(tensor, resident.get_parameter(name))


def test_a_filled_slot_tells_autograd_that_it_changed(homes, transfer):
    slot = slot_for(homes)
    view = slot.buffer[:4].view(torch.float32)
    for path in ("blocks.0.up.weight", "norm.weight"):
        version = view._version
        transfer.start(homes.plan.page_of(path), slot)
        transfer.wait(slot)
        assert view._version > version


def test_nothing_starts_once_it_is_closed(homes):
    before = set(threading.enumerate())
    transfer = Transfer(homes, torch.device("cpu"))
    transfer.start(homes.plan.page_of("blocks.0.up.weight"), slot_for(homes))
    transfer.close()
    transfer.close()
    with pytest.raises(PagingError, match="let go of"):
        transfer.start(homes.plan.page_of("norm.weight"), slot_for(homes))
    homes.close()
    assert set(threading.enumerate()) <= before
