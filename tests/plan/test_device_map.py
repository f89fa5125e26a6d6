from __future__ import annotations

import logging
import random
import warnings

import accelerate
import pytest
import torch
from accelerate.utils.modeling import clean_device_map as their_clean_device_map
from torch import nn

from tuckaway.config import QuantizationConfig
from tuckaway.empty import init_empty_weights
from tuckaway.errors import PlanError
from tuckaway.plan import (
    check_device_map,
    check_devices,
    choose_specs,
    clean_device_map,
    compute_module_sizes,
    infer_auto_device_map,
    main_device_of,
    place_of,
    tensor_sizes,
)
from tuckaway.plan.device_map import normalized


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(width, width), nn.Linear(width, 4 * width), nn.LayerNorm(width)


class Tiny(nn.Module):
    def __init__(self, width: int = 16, layers: int = 4, words: int = 20, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.h = nn.ModuleList([Block(width) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.embed.weight


class Direct(nn.Module):
    """A module that is split, with a parameter and buffers of its own (accelerate forgets the buffers)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(10))
        self.register_buffer("steps", torch.zeros(10))
        self.register_buffer("ids", torch.arange(5), persistent=False)
        self.a, self.b = nn.Linear(10, 10), nn.Linear(10, 10)


def their_map(model, max_memory, **options):
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(accelerate.infer_auto_device_map(model, dict(max_memory), **options))


def bytes_on(model, device_map, *devices, specs=None):
    """Bytes of distinct tensors by where the map puts them."""
    sizes, seen = tensor_sizes(model, specs), {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            seen.setdefault(id(tensor), (place_of(name, device_map), sizes[name]))
            assert seen[id(tensor)][0] == place_of(name, device_map), f"{name} is torn from its tie"
    return sum(size for place, size in seen.values() if place in devices)


@pytest.mark.parametrize(
    ("max_memory", "options"),
    [
        ({"cpu": 10**9}, {}),
        ({0: 10**9}, {}),
        ({0: 10**9, "cpu": 10**9}, {}),
        ({0: 12000, "cpu": 10**9}, {}),
        ({0: 12000, "cpu": 10**9}, {"no_split_module_classes": ["Block"]}),
        ({0: 12000, "cpu": 10**9}, {"no_split_module_classes": "Block"}),
        ({0: 12000, "cpu": 14000}, {"no_split_module_classes": ["Block"]}),
        ({0: 9000, "cpu": 10**9}, {"dtype": torch.float16, "no_split_module_classes": ["Block"]}),
        ({0: 12000, "cpu": 10**9}, {"special_dtypes": {"h.0.b.weight": torch.float16}}),
        ({0: 12000, "cpu": 10**9}, {"clean_result": False}),
        ({"cpu": 9000}, {}),
        ({0: 2000, "cpu": 10**9}, {"fallback_allocation": True}),
        ({}, {}),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_as_accelerate(max_memory, options, tied):
    model = Tiny(tied=tied)
    assert infer_auto_device_map(model, max_memory, **options) == their_map(model, max_memory, **options)


@pytest.mark.parametrize("seed", range(40))
def test_never_worse_than_accelerate_and_within_limits(seed):
    chance = random.Random(seed)
    model = Tiny(layers=chance.choice([2, 6]), words=chance.choice([20, 200]), tied=chance.random() < 0.5)
    total = compute_module_sizes(model)[""]
    limits = {i: int(total * chance.uniform(0.1, 0.7)) for i in range(chance.choice([0, 1, 2, 3]))}
    limits["cpu"] = int(total * chance.uniform(0.1, 1.2))
    whole = chance.choice([[], ["Block"]])
    ours = infer_auto_device_map(model, limits, whole)
    theirs = their_map(model, limits, no_split_module_classes=whole)
    check_device_map(model, ours)
    gpus = [d for d in limits if d != "cpu"]
    assert bytes_on(model, ours, "disk") <= bytes_on(model, theirs, "disk")
    assert bytes_on(model, ours, *gpus) >= bytes_on(model, theirs, *gpus)
    sizes = compute_module_sizes(model)

    def largest_layer(*devices):
        layers = [n for n, m in model.named_modules() if type(m).__name__ in whole or not list(m.children())]
        layers = [n for n in layers if not any(n.startswith(f"{other}.") for other in layers)]
        return max((sizes.get(n, 0) for n in layers if place_of(n, ours) in devices), default=0)

    for device, limit in limits.items():
        need = bytes_on(model, ours, device)
        if need:
            away = {"cpu": ("disk",), 0: ("cpu", "disk")}.get(device, ())
            assert need + largest_layer(*away) <= limit
    for name, module in model.named_modules():
        if type(module).__name__ in whole:
            assert len({place_of(f"{name}.{n}", ours) for n, _ in module.named_parameters()}) == 1


def test_room_is_kept_only_when_something_is_offloaded():
    model = Tiny()
    total = compute_module_sizes(model)[""]
    assert infer_auto_device_map(model, {0: total}) == {"": 0}
    half = {0: total // 2, 1: total // 2 + 100}
    assert "disk" not in infer_auto_device_map(model, half).values()
    assert "disk" in their_map(model, half).values()


def test_a_split_modules_own_tensors_are_placed():
    model = Direct()
    limits = {0: 700, "cpu": 10**6}
    ours = infer_auto_device_map(model, limits)
    check_device_map(model, ours)
    assert {"scale", "steps", "ids"} <= set(ours)
    nested = nn.ModuleDict({"inner": Direct()})
    ours = infer_auto_device_map(nested, limits)
    check_device_map(nested, ours)
    assert "inner.steps" in ours
    assert "inner.steps" not in their_map(nested, limits)


def test_buffers_that_stay_are_counted():
    model = nn.Sequential(*[nn.BatchNorm1d(1000, affine=False) for _ in range(3)], nn.Linear(50, 50))
    buffers = 3 * 8008
    limits = {0: buffers + 10200 - 1, "cpu": 10**6}
    ours = infer_auto_device_map(model, limits, offload_buffers=False)
    offloaded = sum(8008 for i in range(3) if place_of(str(i), ours) == "cpu")
    assert bytes_on(model, ours, 0) + offloaded <= limits[0]


def test_exact_sizes_of_quantized_weights():
    with init_empty_weights():
        model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(8)])
    specs, _ = choose_specs(model, QuantizationConfig(skip_modules=[]))
    one = specs["0.weight"].nbytes
    assert infer_auto_device_map(model, {0: 8 * one}, specs=specs) == {"": 0}
    ours = infer_auto_device_map(model, {0: 5 * one, "cpu": 10**9}, specs=specs)
    assert bytes_on(model, ours, 0, specs=specs) == 4 * one  # and room for one more
    assert (
        bytes_on(model, infer_auto_device_map(model, {0: 5 * one - 1}, specs=specs), 0, specs=specs)
        == 3 * one
    )


def test_fallback_when_the_first_block_is_too_big():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(10, 10), nn.Linear(100, 100))
    limits = {0: 40400 + 440, "cpu": 10**6}
    assert infer_auto_device_map(model, limits) == {"": "cpu"}
    assert infer_auto_device_map(model, limits, fallback_allocation=True) == {"1": 0, "0": "cpu", "2": "cpu"}


def test_verbose_is_logged(caplog, capsys):
    with caplog.at_level(logging.INFO, "tuckaway"):
        infer_auto_device_map(Tiny(), {0: 100, "cpu": 10**6}, verbose=True)
    assert "embed needs 1280 bytes, 0 has 100" in caplog.text
    assert "nothing was placed on 0: its first candidate needs 1.28 kB" in caplog.text
    assert capsys.readouterr().out == ""


def test_a_limited_disk():
    model = Tiny()
    total = compute_module_sizes(model)[""]
    assert infer_auto_device_map(model, {"disk": total}) == {"": "disk"}
    with pytest.raises(
        PlanError, match=r"1280 bytes\) of the model fit nowhere.*head.*raise max_memory\['disk'\]"
    ):
        infer_auto_device_map(model, {"disk": total - 1})


def test_empty_models():
    assert infer_auto_device_map(nn.Sequential(), {0: 10}) == {}
    assert infer_auto_device_map(nn.Sequential(nn.ReLU(), nn.ReLU()), {0: 10}) == {"": 0}


# Cleaning, checking, reading


@pytest.mark.parametrize(
    "device_map",
    [
        {"a.b": 0, "a.c": 0, "d": 1},
        {"a.b": 0, "a.c": 1, "d": 1},
        {"a": 0, "b": 0},
        {"a": 0},
        {"a.b.c": 0, "a.b.d": 0, "a.e": 0, "f.g": "cpu", "f.h": "cpu", "ff": "disk"},
        {"": 0},
        {},
    ],
)
def test_clean_as_accelerate(device_map):
    mine = dict(device_map)
    assert clean_device_map(mine) is mine
    assert mine == their_clean_device_map(dict(device_map))


def test_clean_minds_what_an_entry_above_stands_for():
    assert clean_device_map({"a": 0, "a.b": 1, "a.c": 1}) == {"a": 0, "a.b": 1, "a.c": 1}
    assert clean_device_map({"": 0, "a.b": 1, "a.c": 1}) == {"": 0, "a.b": 1, "a.c": 1}
    assert clean_device_map({"": 0, "a.b": 0, "a.c": 0}) == {"": 0}


def test_check_device_map():
    model = Direct()
    check_device_map(model, {"": 0})
    check_device_map(model, {"scale": 0, "steps": 0, "a": 1, "b": "disk"})  # ids are no part of the state
    check_device_map(model, {"": 0, "a": 1, "a.weight": "cpu"})
    with pytest.raises(PlanError, match=r"leaves out 'b.weight', 'b.bias', 'steps'\. add an entry"):
        check_device_map(model, {"scale": 0, "a": 0})
    with pytest.raises(PlanError, match=r"names 'scael'.*did you mean 'scale'"):
        check_device_map(model, {"": 0, "scael": 0})
    with pytest.raises(PlanError, match="and 1 more"):
        check_device_map(model, {"a.weight": 0, "scale": 0})


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (0, 0),
        ("cuda:1", 1),
        (torch.device("cuda", 2), 2),
        ("xpu:0", 0),
        ("cpu", "cpu"),
        (torch.device("cpu"), "cpu"),
        ("cpu:0", "cpu"),
        ("disk", "disk"),
        ("mps", "mps"),
    ],
)
def test_normalized(place, expected):
    assert normalized(place) == expected


@pytest.mark.parametrize("place", [-1, True, None, "gpu", "meta", 1.0, "disk:0"])
def test_places_nobody_knows(place):
    with pytest.raises(PlanError):
        normalized(place)


def test_place_of_takes_the_longest_entry():
    device_map = {"": 0, "a": "cpu", "a.b": "disk"}
    assert [place_of(n, device_map) for n in ("x.y", "a", "a.c.d", "a.b.w", "ab")] == [
        0,
        "cpu",
        "cpu",
        "disk",
        0,
    ]
    with pytest.raises(PlanError, match="'b'"):
        place_of("b", {"a": 0})


def test_main_device():
    kind = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cuda"
    assert main_device_of({"a": "cpu", "b": "disk"}) == torch.device("cpu")
    assert main_device_of({"a": "cpu", "b": 1, "c": 0}) == torch.device(kind, 1)
    assert main_device_of({"a": "cpu"}, 0) == torch.device(kind, 0)
    assert main_device_of({"a": 0}, "cpu") == torch.device("cpu")
    with pytest.raises(PlanError, match="cannot execute"):
        main_device_of({"a": 0}, "disk")


def test_check_devices(monkeypatch):
    check_devices({"": "cpu", "a": "disk"})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    check_devices({"": 1})
    with pytest.raises(
        PlanError, match=r"accelerator 2 does not exist; this machine has 2 \(device map, 'a'\)"
    ):
        check_devices({"": 0, "a": 2})
