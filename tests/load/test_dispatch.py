"""accelerate's functions for models that have their weights: quantized stays quantized, plain stays plain."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

import tuckaway
from loading import FORMATS, FP32, assert_same_state, empty_net, net, refused, tokens
from tuckaway.errors import (
    CheckpointError,
    CheckpointNotFound,
    ConfigError,
    KeyMismatch,
    PagingError,
    PlanError,
    ShapeMismatch,
)


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
            lambda m, f: tuckaway.dispatch_model(m, {"": "cpu", "layers": "disk"}, "cpu", None, f),
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
        tuckaway.dispatch_model(model, {"": "cpu"}, "disk", offload_dir=tmp_path)


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


SHARED = ("model", "device_map", "max_memory", "no_split_module_classes", "dtype", "execution_device")


@pytest.mark.parametrize(
    "name",
    ["dispatch_model", "cpu_offload", "disk_offload", "infer_auto_device_map", "load_checkpoint_in_model"],
)
def test_parameters_and_defaults_are_accelerates(name: str) -> None:
    theirs = inspect.signature(getattr(accelerate, name)).parameters
    ours = inspect.signature(getattr(tuckaway, name)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for parameter, expected in theirs.items():
        assert ours[parameter].default == expected.default
    added = list(ours.values())[len(theirs) :]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in added)


def test_balanced_memory_has_accelerates_parameters_too() -> None:
    theirs = inspect.signature(accelerate.utils.get_balanced_memory).parameters
    ours = inspect.signature(tuckaway.get_balanced_memory).parameters
    assert {n: p.default for n, p in list(ours.items())[: len(theirs)]} == {
        n: p.default for n, p in theirs.items()
    }


def test_again_with_another_map(tmp_path: Path) -> None:
    source = quantized("nf4")
    model = copy.deepcopy(source)
    with torch.no_grad():
        expected = source(tokens())
    for number, places in enumerate(
        [{"": "disk"}, {"": "cpu", "layers.1": "disk"}, {"": "cpu"}, {"": "disk"}]
    ):
        tuckaway.dispatch_model(model, places, offload_dir=tmp_path / str(number))
        assert model.hf_device_map == places
        with torch.no_grad():
            assert torch.equal(model(tokens()), expected)
        assert tuckaway.materialize(model) is model
    assert_same_state(model, source)


def test_a_paged_model_says_what_it_cannot_do(tmp_path: Path) -> None:
    model = tuckaway.disk_offload(quantized("nf4"), tmp_path)
    for move in (lambda: model.to("meta"), lambda: model.half(), lambda: model.to(dtype=torch.float16)):
        with pytest.raises(PagingError, match=r"cannot be moved or converted.*tuckaway\.materialize"):
            move()
    with pytest.raises(PagingError, match="paged already"):
        tuckaway.dispatch_model(model, {"": "cpu"})
    assert accelerate.utils.has_offloaded_params(model.layers[0].up)
    tuckaway.materialize(model)
    assert not accelerate.utils.has_offloaded_params(model.layers[0].up)


def test_values_from_a_state_dict(tmp_path: Path) -> None:
    source = net(tied=True)
    with torch.no_grad():
        expected = source(tokens())
    state = source.state_dict()
    del state["head.weight"]  # it is the embedding's
    model = tuckaway.cpu_offload(empty_net(tied=True), "cpu", state_dict=state)
    assert model.head.weight is model.embed.weight
    with torch.no_grad():
        assert torch.equal(model(tokens()), expected)
    del state["layers.1.up.weight"]
    bare = empty_net(tied=True)
    with refused(KeyMismatch, "'layers.1.up.weight' is on the meta device and has no value", bare):
        tuckaway.dispatch_model(bare, {"": "cpu"}, state_dict=state)
    state["layers.1.up.weight"] = torch.zeros(2, 2)
    with refused(ShapeMismatch, r"is \[2, 2\], and \[128, 64\] in the model", bare):
        tuckaway.dispatch_model(bare, {"": "cpu"}, state_dict=state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_accelerate_offloaded(dtype: torch.dtype, tmp_path: Path) -> None:
    source = net().to(dtype)
    with torch.no_grad():
        expected = source(tokens())
    accelerate.utils.offload_state_dict(str(tmp_path), source.state_dict())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model = empty_net().to(dtype)
    model.shift.copy_(source.shift)  # an empty model's buffers are real
    tuckaway.disk_offload(model, tmp_path)
    assert before == {path: path.read_bytes() for path in before}
    with torch.no_grad():
        assert torch.equal(model(tokens()), expected)
    # what is real is never taken from files that lie about
    fresh = net(seed=5).to(dtype)
    with torch.no_grad():
        own = fresh(tokens())
        again = tuckaway.dispatch_model(fresh, {"": "cpu"}, offload_dir=tmp_path)
        assert torch.equal(again(tokens()), own)


def test_an_index_of_safetensors(tmp_path: Path) -> None:
    source = net()
    tuckaway.save_model(source, tmp_path / "checkpoint")
    file = str(next((tmp_path / "checkpoint").glob("*.safetensors")))
    index = {
        name: {"safetensors_file": file, "weight_name": name, "dtype": "float32"}
        for name in source.state_dict()
    }
    model = tuckaway.dispatch_model(
        empty_net(), {"": "cpu", "layers": "disk"}, offload_dir=tmp_path / "pages", offload_index=index
    )
    with torch.no_grad():
        assert torch.equal(model(tokens()), source(tokens()))
    index["embed.weight"] = {"safetensors_file": str(tmp_path / "none.safetensors"), "dtype": "float32"}
    with pytest.raises(CheckpointNotFound, match=r"embed\.weight"):
        tuckaway.dispatch_model(empty_net(), {"": "cpu"}, offload_index=index)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"embed.weight": 3}', '{"embed.weight": {"dtype": "float32"}}']
)
def test_an_index_that_makes_no_sense(content: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises((CheckpointError, KeyMismatch)):
        tuckaway.disk_offload(empty_net(), tmp_path)


def test_a_name_that_leads_out_of_the_folder_is_no_file(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("/etc", nn.Linear(1, 1, bias=False, device="meta"))

    index = {"/etc.weight": {"dtype": "float32", "shape": [1, 1]}}
    with pytest.raises(CheckpointError, match="leads out"):
        tuckaway.dispatch_model(Odd(), {"": "cpu"}, offload_dir=tmp_path, offload_index=index)


def test_modules_that_are_preloaded_are_paged_whole(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.inner[0].weight @ self.inner[1].weight  # neither is called

    model = nn.Sequential(Holder(), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    with torch.no_grad():
        expected = model(x)
        tuckaway.disk_offload(model, tmp_path, preload_module_classes=["Holder"])
        assert [page.unit.name for page in model._tuckaway_paging.pages] == ["0", "1"]
        assert torch.equal(model(x), expected)


def test_hooks_are_forced_where_nothing_is_paged() -> None:
    model = tuckaway.dispatch_model(quantized("nf4"), {"": "cpu"}, force_hooks=True)
    assert model._hf_hook.execution_device == torch.device("cpu")
    tuckaway.materialize(model)
    assert not hasattr(model, "_hf_hook")


def test_a_plan_places_a_real_model(tmp_path: Path) -> None:
    model = net()
    plan = tuckaway.plan(model, "none", {"": "cpu", "layers": "disk"}, reserve_bytes=0)
    with torch.no_grad():
        expected = model(tokens())
        tuckaway.dispatch_model(model, plan, offload_dir=tmp_path)
        assert torch.equal(model(tokens()), expected)
    assert tuckaway.memory_footprint(model, by_device=True)["disk"] == plan.on("disk").weights_bytes
