"""A paged model becomes an ordinary one again."""

from __future__ import annotations

import copy

import pytest
import torch

from paging_models import ON_CPU, make, page, quantize_linears, tokens
from tuckaway.config import QuantizationConfig
from tuckaway.errors import PagingError
from tuckaway.paging import is_paged, materialize, offloaded_tensor, paging_of
from tuckaway.tensor import QuantizedTensor


@pytest.fixture(params=list(ON_CPU))
def device_map(request):
    return ON_CPU[request.param]


@pytest.mark.parametrize("format", [None, "nf4"])
def test_materialize_makes_it_an_ordinary_model_again(tmp_path, device_map, format):
    def build():
        model = make()
        return (
            quantize_linears(model, QuantizationConfig(format=format, compute_dtype=None))
            if format
            else model
        )

    resident, model = build(), page(build(), device_map, tmp_path)
    model.hf_device_map = {"": "cpu"}
    with torch.no_grad():
        model(tokens())
    assert materialize(model) is model
    assert paging_of(model) is None
    assert materialize(model, "cpu") is model
    for (name, a), (_, b) in zip(model.named_parameters(), resident.named_parameters(), strict=True):
        assert a.requires_grad == b.requires_grad
        assert type(a) is type(b)
        a, b = (t.dequantize() if isinstance(t, QuantizedTensor) else t for t in (a, b))
        assert torch.equal(a, b), name
    assert model.head.weight is model.embedding.weight
    assert not any(
        "_hf_hook" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.modules()
    )
    assert "to" not in model.__dict__
    with torch.no_grad():
        assert torch.equal(model(tokens()), resident(tokens()))
    copy.deepcopy(model).to("cpu")
    if tmp_path.joinpath("pages.bin").exists():
        assert not tmp_path.joinpath("tuckaway.lock").exists()
    again = page(model, {"": "cpu"})
    with torch.no_grad():
        assert torch.equal(again(tokens()), resident(tokens()))


def test_materialized_tensors_are_nobodys_views(tmp_path):
    model = materialize(page(make(), {"": "cpu"}))
    with torch.no_grad():
        model.norm.weight.fill_(3)
        model.norm.bias.fill_(4)
    assert model.norm.weight.eq(3).all()
    assert model.norm.weight.untyped_storage().nbytes() == model.norm.weight.nbytes


def test_a_model_is_not_materialized_in_the_middle_of_a_forward(tmp_path):
    model = page(make(), {"": "disk"}, tmp_path)
    model.blocks[1].register_forward_pre_hook(lambda *_: materialize(model))
    with torch.no_grad(), pytest.raises(PagingError, match="in use"):
        model(tokens())


def test_tensors_are_read_from_their_homes(tmp_path, device_map):
    resident = make()
    model = page(make(), device_map, tmp_path)
    for name, parameter in resident.named_parameters(remove_duplicate=False):
        assert torch.equal(offloaded_tensor(model, name)[""], parameter), name
    assert offloaded_tensor(model, "blocks.0.scale") is None
    assert offloaded_tensor(resident, "norm.weight") is None
    assert paging_of(model).pager.slots.all == []


def test_what_is_paged(tmp_path):
    model = page(make(), {"": "disk"}, tmp_path)
    assert is_paged(model, "head.weight")
    assert not is_paged(model, "blocks.0.scale")
    assert not is_paged(make(), "head.weight")
