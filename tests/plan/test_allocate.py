from __future__ import annotations

import pytest
import torch
from torch import nn

from tuckaway.plan import tensor_sizes
from tuckaway.plan.allocate import Tree, allocate, is_block


def tree_of(model: nn.Module) -> Tree:
    return Tree(model, tensor_sizes(model))


def linears(*widths: int) -> nn.Module:
    """One float parameter [n] a layer: n * 4 bytes."""
    model = nn.Module()
    for index, width in enumerate(widths):
        layer = nn.Module()
        layer.w = nn.Parameter(torch.zeros(width))
        model.add_module(f"m{index}", layer)
    return model


def anything(name: str, module: nn.Module) -> bool:
    return True


def test_in_order_and_never_back():
    found = allocate(tree_of(linears(1, 3, 1)), [0, 1], {0: 8, 1: 100}, anything)
    assert found.device_map == {"m0": 0, "m1.w": 1, "m2": 1}
    assert found.used == {0: 4, 1: 16}
    assert found.left == []


def test_what_fits_nowhere_is_left():
    found = allocate(tree_of(linears(1, 3)), [0], {0: 8}, anything)
    assert found.device_map == {"m0": 0}
    assert found.left == ["m1.w"]


def test_a_device_that_takes_nothing_says_what_it_needed():
    found = allocate(tree_of(linears(2, 3)), [0, "disk"], {0: 4}, lambda name, module: False)
    assert found.refused == {0: 8}
    assert set(found.device_map.values()) == {"disk"}


def test_tied_through_others():
    model = linears(1, 1, 1, 1)
    model.m2.w = model.m0.w
    model.m2.v = model.m3.w
    found = allocate(tree_of(model), [0, "disk"], {0: 8}, lambda name, module: False)
    assert found.device_map == {"m0": 0, "m2": 0, "m3": 0, "m1": "disk"}
    assert found.used == {0: 8, "disk": 4}


def test_a_tied_module_is_split_rather_than_both_sent_away():
    model = nn.ModuleDict(
        {"embed": linears(2), "rest": nn.ModuleDict({"big": linears(50), "head": linears(2)})}
    )
    model["rest"]["head"].m0.w = model["embed"].m0.w
    found = allocate(tree_of(model), [0, "disk"], {0: 10}, anything)
    assert found.device_map["embed"] == found.device_map["rest.head"] == 0
    assert found.device_map["rest.big.m0.w"] == "disk"


def test_first():
    found = allocate(tree_of(linears(1, 1, 3)), [0, "disk"], {0: 16}, anything, first=["m2"])
    assert found.device_map == {"m2": 0, "m0": 0, "m1.w": "disk"}


def test_fallback_takes_the_first_that_fits_and_goes_on():
    found = allocate(
        tree_of(linears(9, 2, 1)), [0, "disk"], {0: 8}, lambda name, module: False, fallback=True
    )
    assert found.device_map == {"m1": 0, "m0": "disk", "m2": "disk"}


def test_shared_modules_count_once():
    model = nn.Module()
    model.a = model.b = nn.Linear(2, 2)
    found = allocate(tree_of(model), [0], {0: 24}, anything)
    assert found.device_map == {"a": 0, "b": 0}
    assert found.used == {0: 24}


def test_nothing_takes_no_room():
    found = allocate(tree_of(nn.Sequential(nn.ReLU(), nn.Linear(2, 2), nn.ReLU())), [0], {0: 24}, anything)
    assert found.device_map == {"0": 0, "1": 0, "2": 0}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", False),
        ("layers", False),
        ("layers.0", True),
        ("layers.0.0", True),
        ("head", True),
        ("pair", True),
        ("stack", False),
        ("stack.inner", False),
        ("stack.inner.0", True),
    ],
)
def test_blocks(path, expected):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.y = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.y(self.x(x))

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([nn.Linear(2, 2)])

        def forward(self, x):
            return x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)])
            self.pair, self.stack, self.head = Pair(), Stack(), nn.Linear(2, 2)

    assert is_block(Model(), path, ()) is expected
    assert is_block(Model(), path, {"Stack"}) is (expected or path == "stack")
