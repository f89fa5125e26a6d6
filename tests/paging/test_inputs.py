from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch

from tuckaway.paging.inputs import first_device, move, wants_grad

META = torch.device("meta")
CPU = torch.device("cpu")
Pair = namedtuple("Pair", "a b")


@dataclass
class Output:
    hidden: Any
    extra: Any = None


def test_containers_in_which_nothing_moves_are_the_same_objects():
    value = {
        "a": [torch.ones(1), (torch.ones(2), "x")],
        "b": Output(torch.ones(1)),
        "c": Pair(None, torch.ones(1)),
    }
    assert move(value, CPU) is value


def test_everything_moves():
    t = torch.ones(2)
    value = (
        t,
        [t, {"k": t}],
        Pair(t, 1),
        Output(t, [t]),
        defaultdict(list, k=t),
        OrderedDict(k=t),
        UserDict(k=t),
    )
    moved = move(value, META)
    assert isinstance(moved, tuple)
    assert [type(m) for m in moved[1:]] == [type(v) for v in value[1:]]
    flat = (
        moved[0],
        moved[1][0],
        moved[1][1]["k"],
        moved[2].a,
        moved[3].hidden,
        moved[3].extra[0],
        moved[4]["k"],
    )
    assert all(part.is_meta for part in (*flat, moved[5]["k"], moved[6]["k"]))
    assert moved[2].b == 1
    assert moved[4]["new"] == []
    assert not value[1][1]["k"].is_meta
    assert not value[6]["k"].is_meta


def test_what_is_no_tensor_stays():
    for value in (None, 3, "x", object(), [], {}, Output, range(3), {1, 2}):
        assert move(value, META) is value


def test_named_keys_stay():
    t = torch.ones(1)
    moved = move({"x": t, "past": [t], "nested": {"past": t, "y": t}}, META, ["past"])
    assert moved["x"].is_meta
    assert moved["nested"]["y"].is_meta
    assert moved["past"][0] is moved["nested"]["past"] is t


def test_transformers_outputs_keep_their_class():
    from transformers.modeling_outputs import CausalLMOutputWithPast

    output = CausalLMOutputWithPast(logits=torch.ones(1), hidden_states=(torch.ones(1),))
    moved = move(output, META)
    assert type(moved) is CausalLMOutputWithPast
    assert moved.logits.is_meta
    assert moved["hidden_states"][0].is_meta
    assert moved.loss is None
    assert not output.logits.is_meta


def test_the_first_device():
    assert first_device(((), {"a": [None, torch.ones(1, device="meta")], "b": torch.ones(1)})) == META
    assert first_device((1, {"x": None})) is None
    assert first_device(Output(torch.ones(1))) == CPU


def test_gradients_are_seen_anywhere():
    t = torch.ones(1, requires_grad=True)
    for value in (t, [t], (1, {"a": [t]}), Output(None, t)):
        assert wants_grad(value)
    assert not wants_grad([torch.ones(1), {"a": None}, Output(torch.ones(1))])
