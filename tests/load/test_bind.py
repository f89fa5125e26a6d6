"""The one step that changes a model, and how it is taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from loading import FP32
from tuckaway import QuantizedTensor, init_empty_weights
from tuckaway.errors import MismatchError
from tuckaway.load.bind import bind_kept, bind_resident, cast_kept, check_kept, restoration
from tuckaway.load.match import Feed, Match
from tuckaway.load.place import OnDevice
from tuckaway.tensor import TensorSpec, layout_for

CPU = torch.device("cpu")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = nn.Linear(64, 64)
        self.b.weight = self.a.weight
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("freq", torch.ones(2), persistent=False)


def specs_of(model: nn.Module) -> dict[str, TensorSpec]:
    found = {n: TensorSpec.of(p) for n, p in model.named_parameters(remove_duplicate=False)}
    for name, buffer in model.named_buffers():
        found[name] = TensorSpec.of(buffer, is_buffer=True, persistent=name != "freq")
    return found


def test_tied_names_get_one_parameter() -> None:
    with init_empty_weights():
        model = Tied()
    spec = TensorSpec((64, 64), torch.float32, layout_for(FP32, (64, 64), torch.float32, transposed=False))
    names = ("a.weight", "b.weight")
    place = OnDevice(CPU)
    for part in place.open(spec).values():
        part.zero_()
    bind_resident(model, Match((Feed(names, spec, {}, {}),), (), ()), {names: place})
    assert model.a.weight is model.b.weight
    assert isinstance(model.a.weight, QuantizedTensor)
    assert isinstance(model.a.weight, nn.Parameter)
    assert model.a.weight.codes is place.components["codes"]
    assert model.a.bias.is_meta  # what has no place is in a page


def test_buffers_are_bound_as_buffers() -> None:
    model = Tied()
    spec = TensorSpec((), torch.int64, is_buffer=True)
    place = OnDevice(CPU)
    place.open(spec)[""].fill_(7)
    bind_resident(model, Match((Feed(("count",), spec, {}, {}),), (), ()), {("count",): place})
    assert model.count.item() == 7
    assert dict(model.named_buffers())["count"] is model.count


def test_a_kept_buffer_needs_a_value() -> None:
    model = Tied()
    check_kept(model, Match((), ("freq", "count"), ()))
    model.freq = torch.empty(2, device="meta")
    with pytest.raises(MismatchError, match=r"on the meta device \(freq\)\. build the model under"):
        check_kept(model, Match((), ("freq", "count"), ()))


def test_kept_tensors_are_cast_once_and_only_if_they_are_saved() -> None:
    model = Tied()
    specs = {
        name: TensorSpec(s.shape, torch.bfloat16, None, s.requires_grad, s.is_buffer, s.persistent)
        if s.dtype == torch.float32
        else s
        for name, s in specs_of(model).items()
    }
    before = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    kept = tuple(specs)
    bind_kept(model, Match((), kept, ()), specs, lambda name: None if name == "a.bias" else CPU)
    assert model.a.bias is before["a.bias"]  # it has no device of its own: a page took it
    assert model.a.weight is model.b.weight
    assert model.a.weight.dtype == model.b.bias.dtype == torch.bfloat16
    assert model.a.weight.requires_grad
    assert model.freq is before["freq"]  # in no checkpoint: its precision is the constructor's
    assert model.count is before["count"]


def test_kept_tensors_that_are_right_stay_the_same_objects() -> None:
    model = Tied()
    before = [id(t) for t in (*model.parameters(), *model.buffers())]
    specs = specs_of(model)
    bind_kept(model, Match((), tuple(specs), ()), specs, lambda name: CPU)
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == before


def test_cast_kept() -> None:
    x = torch.randn(3)
    half = TensorSpec((3,), torch.bfloat16)
    assert torch.equal(cast_kept(x, half), x.bfloat16())
    assert cast_kept(x, TensorSpec((3,), torch.float32)) is x
    assert cast_kept(x, TensorSpec((3,), torch.bfloat16, is_buffer=True, persistent=False)) is x


def test_restoration_puts_every_object_back() -> None:
    model: Any = Tied()
    model.register_parameter("nothing", None)
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    restore = restoration(model)
    model.a.weight = nn.Parameter(torch.zeros(2))
    model.b._parameters["weight"] = nn.Parameter(torch.zeros(2))
    model.count = torch.zeros(5)
    restore()
    for module, parameters, buffers in before:
        for now, then in ((module._parameters, parameters), (module._buffers, buffers)):
            assert list(now) == list(then)
            assert all(now[name] is then[name] for name in then)
    assert model.a.weight is model.b.weight
