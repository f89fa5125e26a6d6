"""accelerate's functions for models that have their weights: quantized stays quantized, plain stays plain."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import tuckaway
from loading import FORMATS, FP32, assert_same_state, net, refused, tokens
from tuckaway.errors import ConfigError, PlanError


def quantized(format: str | None) -> Any:
    model = net()
    return model if format is None else tuckaway.load_and_quantize_model(model, FP32.replace(format=format))


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("buffers", [False, True])
def test_every_function_gives_the_same_logits(format: str | None, buffers: bool, tmp_path: Path) -> None:
    source = quantized(format)
    with torch.no_grad():
        expected = source(tokens())
    for number, place in enumerate(
        [
            lambda m, f: tuckaway.cpu_offload(m, offload_buffers=buffers),
            lambda m, f: tuckaway.cpu_offload(m, "cpu", buffers),
            lambda m, f: tuckaway.disk_offload(m, f, offload_buffers=buffers),
            lambda m, f: tuckaway.dispatch_model(m, {"": "cpu"}),
            lambda m, f: tuckaway.dispatch_model(m, {"": "disk"}, offload_dir=f, offload_buffers=buffers),
            lambda m, f: tuckaway.dispatch_model(m, {"": "cpu", "layers": "disk"}, "cpu", f),
            lambda m, f: tuckaway.dispatch_model(
                m, {"": "cpu", "layers": "disk"}, offload_dir=f, no_split_module_classes=["Layer"]
            ),
        ]
    ):
        model = copy.deepcopy(source)
        placed = place(model, tmp_path / str(number))
        assert placed is model
        with torch.no_grad():
            assert torch.equal(placed(tokens()), expected)
        assert set(placed.hf_device_map.values()) <= {"cpu", "disk"}
        assert_same_state(tuckaway.materialize(placed), source)


def test_the_map_must_cover_the_model_and_the_disk_needs_a_folder(tmp_path: Path) -> None:
    model = quantized("nf4")
    with refused(PlanError, "leaves out 'shift'", model, tmp_path):
        tuckaway.dispatch_model(
            model, {"embed": "cpu", "layers": "disk", "norm": "cpu", "head": "cpu"}, offload_dir=tmp_path
        )
    with refused(PlanError, "offload_folder is None", model):
        tuckaway.dispatch_model(model, {"": "disk"})
    with refused(PlanError, "'disk' cannot execute", model, tmp_path):
        tuckaway.dispatch_model(model, {"": "cpu"}, "disk", tmp_path)


def test_a_resident_model_is_an_ordinary_one() -> None:
    """On the CPU nothing has to be brought anywhere: no hooks, so it can be copied, pickled, moved and saved."""
    model = tuckaway.dispatch_model(quantized("nf4"), {"": "cpu"})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert_same_state(copy.deepcopy(model), model)
    assert model.to(torch.bfloat16).layers[0].up.weight.dtype == torch.bfloat16


def test_more_slots_and_disk_pages_that_stay_in_memory(tmp_path: Path) -> None:
    source = quantized("nf4")
    with torch.no_grad():
        expected = source(tokens())
        model = tuckaway.dispatch_model(
            source, {"": "disk"}, offload_dir=tmp_path, slots=3, disk_cache_bytes="1MB"
        )
        for _ in range(3):
            assert torch.equal(model(tokens()), expected)
    paging = model._tuckaway_paging
    assert paging.pager.slots.count == 3
    assert all(paging.homes.in_memory(page.unit) is not None for page in paging.pages)
    tuckaway.materialize(model)
    with refused(ConfigError, "slots must be at least 1", model, tmp_path):
        tuckaway.dispatch_model(model, {"": "disk"}, offload_dir=tmp_path, slots=0)
