"""Memory that runs out at the n-th allocation, for every n: as before, and nothing is kept."""

from __future__ import annotations

import gc
import mmap
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import tuckaway
from heavy import count
from loading import FP32, assert_same_state, empty_net, net, refused
from tuckaway.errors import LoadOutOfMemoryError, ShapeMismatch

PLACES = [{"": "cpu"}, {"": "cpu", "layers": "disk"}]


class Allocator:
    """Counts what Python code allocates, and fails the n-th."""

    def __init__(self) -> None:
        self.calls = 0
        self.fail_at = 0
        self.made: list[weakref.ref[torch.Tensor]] = []

    def wrap(self, allocate: Callable[..., Any]) -> Callable[..., Any]:
        def allocating(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at:
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
                )
            made = allocate(*args, **kwargs)
            if isinstance(made, torch.Tensor) and not made.is_meta:
                self.made.append(weakref.ref(made))
            return made

        return allocating

    @contextmanager
    def installed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for owner, names in (
                (torch, ("empty", "empty_like", "empty_strided", "zeros", "tensor", "stack", "frombuffer")),
                (torch.Tensor, ("new_empty", "clone", "contiguous", "to", "float", "half")),
                (mmap, ("mmap",)),
            ):
                for name in names:
                    patch.setattr(owner, name, self.wrap(getattr(owner, name)))
            yield


@pytest.mark.heavy
@pytest.mark.timeout(600)
@pytest.mark.parametrize("places", PLACES, ids=["cpu", "disk"])
def test_every_allocation_can_fail(tmp_path: Path, places: dict[str, str]) -> None:
    tuckaway.save_model(net(layers=2), tmp_path / "checkpoint", max_shard_size="60kB")

    def load(model: Any, store: Path) -> None:
        tuckaway.load_and_quantize_model(
            model, FP32, tmp_path / "checkpoint", device_map=places, offload_folder=store
        )

    load(expected := empty_net(layers=2), tmp_path / "first")
    failures = 0
    for n in range(1, 5000, count(29, 7)):
        allocator, empty, store = Allocator(), empty_net(layers=2), tmp_path / "store"
        allocator.fail_at = n
        if allocator_is_past(allocator, partial(load, empty, store), empty):
            break
        failures += 1
        # a fill that was complete is as good as any; an incomplete one leaves nothing
        left = sorted(os.listdir(store)) if store.exists() else []
        assert left in ([], ["manifest.json", "pages.bin"])
        shutil.rmtree(store, ignore_errors=True)
        gc.collect()
        assert not [made for made in allocator.made if made() is not None]
    assert failures >= count(3, 15)
    tuckaway.materialize(empty)
    tuckaway.materialize(expected)
    assert_same_state(empty, expected)


def allocator_is_past(allocator: Allocator, load: Callable[[], None], empty: Any) -> bool:
    """Load with an allocation failing; whether there was none left to fail."""
    try:
        with refused(LoadOutOfMemoryError, "memory ran out while loading", empty), allocator.installed():
            load()
    except pytest.fail.Exception:
        assert allocator.calls < allocator.fail_at
        return True
    return False


@pytest.mark.heavy
def test_a_hundred_failed_loads_keep_no_memory(tmp_path: Path) -> None:
    """Within a megabyte of private memory, after the first few have filled the allocators' pools."""
    tuckaway.save_model(net(), tmp_path / "checkpoint", max_shard_size="60kB")
    empty = empty_net(width=32)
    process = psutil.Process()

    def fail(times: int) -> int:
        for _ in range(times):
            with pytest.raises(ShapeMismatch):
                tuckaway.load_and_quantize_model(empty, FP32, tmp_path / "checkpoint")
        gc.collect()
        return process.memory_full_info().uss

    before = fail(30)
    assert fail(100) - before < 2**20
