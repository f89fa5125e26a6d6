"""Bytes by device: told from definitions that use nothing of the planner."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import tuckaway
from loading import empty_net, net
from tuckaway.checkpoint import PIECE_BYTES, Ring
from tuckaway.config import QuantizationConfig
from tuckaway.errors import PlanError
from tuckaway.load import carry
from tuckaway.plan import choose_specs
from tuckaway.plan.accounts import DeviceMemory, account, host_ring_bytes, load_work_bytes

NF4 = QuantizationConfig()


def up(size: int, step: int) -> int:
    return math.ceil(size / step) * step


def components(spec) -> list[int]:
    return [math.prod(shape) * dtype.itemsize for shape, dtype in spec.components().values()]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format", [None, "nf4", "int8"])
def test_resident_bytes_are_those_of_every_tensor_rounded_as_the_allocator_does(tied, format):
    model = empty_net(tied=tied)
    specs, _ = choose_specs(model, None if format is None else QuantizationConfig(format=format))
    found = account(model, specs, {"": 0})
    once = {name: spec for name, spec in specs.items() if not (tied and name == "head.weight")}
    sizes = [size for spec in once.values() for size in components(spec)]
    assert found.devices[0].weights_bytes == sum(sizes)
    assert found.devices[0].in_use_bytes == sum(up(size, 512) for size in sizes)
    assert found.devices[0].slots_bytes == 0
    assert found.places.keys() == once.keys()


def test_pages_and_slots_are_laid_out_as_paging_does():
    model = empty_net(layers=5)
    specs, _ = choose_specs(model, NF4)
    places = {"": 0, "layers": "cpu", "layers.4": "disk"}
    found = account(model, specs, places, slots=3)
    layer = [name for name in specs if name.startswith("layers.0.")]
    page = sum(up(size, 256) for name in layer for size in components(specs[name]))
    exact = sum(specs[name].nbytes for name in layer)
    ram, disk = found.devices["cpu"], found.devices["disk"]
    assert (ram.weights_bytes, disk.weights_bytes) == (4 * exact, exact)
    assert ram.weights_bytes + ram.padding_bytes == 4 * up(page, 4096)
    assert disk.weights_bytes + disk.padding_bytes == up(page, 4096)
    assert 3 * page <= found.devices[0].slots_bytes <= 3 * up(page + 512, 512)
    assert found.pages.slot_nbytes == page


def test_on_the_cpu_pages_come_from_disk_only():
    model = empty_net()
    specs, _ = choose_specs(model, NF4)
    found = account(model, specs, {"": "cpu", "layers.1": "disk"})
    assert set(found.devices) == {"cpu", "disk"}
    assert found.devices["cpu"].slots_bytes == found.pages.slot_nbytes
    assert found.devices["cpu"].padding_bytes == 0
    assert found.devices["cpu"].loading_bytes == host_ring_bytes("cpu") < host_ring_bytes(0)


def test_buffers_of_offloaded_blocks_stay_unless_they_are_paged_too():
    model = empty_net()
    specs, _ = choose_specs(model, NF4)
    kept = account(model, specs, {"": "cpu"}, main=0)
    paged = account(model, specs, {"": "cpu"}, main=0, offload_buffers=True)
    assert kept.devices[0].weights_bytes == specs["freq"].nbytes + specs["shift"].nbytes
    assert paged.devices[0].weights_bytes == specs["freq"].nbytes  # no checkpoint holds it


def test_a_real_model_takes_what_was_counted():
    model = net()
    specs, _ = choose_specs(model, None)
    expected = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert account(model, specs, {"": "cpu"}).devices["cpu"].weights_bytes == expected


def test_several_accelerators():
    model = empty_net()
    specs, _ = choose_specs(model, NF4)
    found = account(model, specs, {"": 1, "layers.0": 0, "head": 2}, reserve_bytes={0: 7, 3: 9})
    assert set(found.devices) == {0, 1, 2, 3, "cpu"}
    assert found.devices[0].reserve_bytes == 7
    assert sum(m.weights_bytes for m in found.devices.values()) == sum(s.nbytes for s in specs.values())


def test_loading_and_running_do_not_happen_at_once():
    memory = DeviceMemory(0, 100, 10, slots_bytes=50, loading_bytes=30, reserve_bytes=5, limit_bytes=170)
    assert (memory.in_use_bytes, memory.peak_bytes, memory.free_bytes) == (160, 165, 5)
    assert DeviceMemory(0, 100, loading_bytes=30, reserve_bytes=5).peak_bytes == 130
    ram = DeviceMemory("cpu", 100, 10, buffers_bytes=99, loading_bytes=300, limit_bytes=110)
    assert (ram.peak_bytes, ram.counted_bytes, ram.free_bytes) == (410, 110, 0)


def test_the_work_of_loading_is_bounded_by_pieces():
    piece = 16 * 2**20
    with torch.device("meta"):
        large, small = nn.Linear(16384, 16384, bias=False), nn.Linear(64, 64, bias=False)
    specs, _ = choose_specs(large, NF4)
    scales = 4 * 16384 * 16384 // 64
    assert load_work_bytes(specs) == 4 * piece + scales
    assert load_work_bytes(specs, ["weight"]) == 4 * piece + scales + specs["weight"].nbytes
    assert load_work_bytes(choose_specs(small, NF4)[0]) == 4 * 4 * 64 * 64 + 4 * 64
    assert load_work_bytes(choose_specs(large, QuantizationConfig(nested=False))[0]) == 4 * piece
    assert load_work_bytes(choose_specs(large, None)[0]) == 2 * piece


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_the_planner_and_the_search_for_a_map_count_the_same(format):
    model = empty_net(layers=10)
    specs, _ = choose_specs(model, QuantizationConfig(format=format))
    places = {"": 0, **{f"layers.{i}": "cpu" if i < 6 else "disk" for i in range(3, 10)}}
    found = account(model, specs, places, reserve_bytes={0: 5000}, slots=3, disk_cache_bytes=60_000)
    options = {"slots": 3, "disk_cache_bytes": 60_000, "reserve_bytes": 5000}
    plan = tuckaway.plan(model, format, places, **options)
    assert {memory.device: replace(memory, limit_bytes=None) for memory in plan.devices} == found.devices
    assert plan.slot_bytes == found.pages.slot_nbytes
    least = found.least_memory
    assert "disk" not in least
    searched = tuckaway.plan(model, format, max_memory=least, **options)
    assert searched.on(0).weights_bytes >= plan.on(0).weights_bytes
    assert {device: searched.on(device).counted_bytes <= size for device, size in least.items()} == {
        0: True,
        "cpu": True,
    }
    with pytest.raises(PlanError, match="1 bytes more"):
        tuckaway.plan(model, format, places, {**least, 0: least[0] - 1}, **options)


def test_the_ring_of_the_plan_is_the_loaders():
    assert host_ring_bytes("cpu") == Ring.towards(torch.device("cpu")).count * PIECE_BYTES
    assert host_ring_bytes(0) == Ring.towards(torch.device("cuda", 0)).count * PIECE_BYTES
    assert carry.PIECE_BYTES <= PIECE_BYTES


def test_a_map_that_leaves_something_out():
    model = empty_net()
    with pytest.raises(PlanError, match="leaves out"):
        account(model, choose_specs(model, NF4)[0], {"layers": 0})
