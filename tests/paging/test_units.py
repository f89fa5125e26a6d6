from __future__ import annotations

import pytest
import torch
from torch import nn

from paging_models import Net, make, specs_of
from tuckaway.errors import PlanError
from tuckaway.paging.page import PageLayout
from tuckaway.paging.units import plan_pages


def plan(model, device_map, **options):
    options = {"execution_device": "cpu", "page_cpu": True, **options}
    return plan_pages(model, specs_of(model), device_map, **options)


def names(found):
    return {page.name: page.tensors for page in found.pages}


def test_elements_of_a_list_and_leaves_are_pages():
    found = plan(make(blocks=2), {"": "disk"})
    block = ("norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias")
    assert names(found) == {
        "Net": ("position",),
        "embedding": ("embedding.weight",),
        "blocks.0": tuple(f"blocks.0.{n}" for n in block),
        "blocks.1": tuple(f"blocks.1.{n}" for n in block),
        "norm": ("norm.weight", "norm.bias"),
    }
    assert [page.index for page in found.pages] == list(range(5))
    assert [page.outer for page in found.pages] == [True, False, False, False, False]
    assert {page.home for page in found.pages} == {"disk"}


def test_a_page_is_laid_out_in_the_order_of_its_tensors():
    model = make(blocks=1)
    page = plan(model, {"": "disk"}).page_of("blocks.0.up.bias")
    specs = specs_of(model)
    assert page.layout.items == PageLayout.of({name: specs[name] for name in page.tensors}).items


def test_tied_tensors_are_one_page_that_both_ask_for():
    found = plan(make(), {"": "disk"})
    page = found.page_of("head.weight")
    assert page is found.page_of("embedding.weight")
    assert page.tensors == ("embedding.weight",)
    assert page.askers == ("embedding", "head")
    assert found.canonical["head.weight"] == "embedding.weight"


def test_ties_that_the_model_has_lost_can_be_told():
    model = make()
    model.head.weight = nn.Parameter(model.embedding.weight.clone())
    assert plan(model, {"": "disk"}).page_of("head.weight").tensors == ("head.weight",)
    found = plan(model, {"": "disk"}, ties=[["head.weight", "embedding.weight"]])
    assert found.page_of("head.weight").tensors == ("embedding.weight",)


def test_a_tensor_that_is_resident_for_one_is_resident_for_all():
    found = plan(make(), {"": "disk", "embedding": "cpu"}, page_cpu=False)
    assert found.page_of("head.weight") is None
    assert found.resident["head.weight"] == found.resident["embedding.weight"] == torch.device("cpu")


def test_tied_tensors_of_two_homes_are_in_memory():
    assert plan(make(), {"": "disk", "head": "cpu"}).page_of("embedding.weight").home == "cpu"


def test_a_tensor_shared_by_two_blocks_is_a_page_of_its_own():
    model = make(blocks=3)
    model.blocks[2].up.weight = model.blocks[0].up.weight
    found = plan(model, {"": "disk"})
    page = found.page_of("blocks.2.up.weight")
    assert page.tensors == ("blocks.0.up.weight",)
    assert page.askers == ("blocks.0", "blocks.2")
    assert "blocks.0.up.bias" in found.page_of("blocks.0.up.bias").tensors


def test_a_block_used_twice_is_one_page():
    model = make(blocks=1)
    model.blocks.append(model.blocks[0])
    found = plan(model, {"": "disk"})
    assert names(found).keys() == {"Net", "embedding", "blocks.0", "norm"}
    assert found.page_of("blocks.1.up.weight") is found.page_of("blocks.0.up.weight")


def test_the_longest_entry_counts():
    found = plan(make(blocks=3), {"": "disk", "blocks.1": "cpu", "blocks.1.up": "disk", "norm.bias": "cpu"})
    assert found.page_of("blocks.0.up.weight").home == "disk"
    assert found.page_of("blocks.1.down.weight").home == "cpu"
    up = found.page_of("blocks.1.up.weight")
    assert (up.home, up.tensors, up.askers) == (
        "disk",
        ("blocks.1.up.weight", "blocks.1.up.bias"),
        ("blocks.1.up",),
    )
    assert found.page_of("blocks.1.down.weight").outer
    assert found.page_of("norm.bias").home == "cpu"
    assert found.page_of("norm.bias").askers == ("norm",)
    assert found.page_of("norm.weight").home == "disk"


def test_named_classes_stay_whole():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    model = nn.Module()
    model.deep = Deep()
    assert names(plan(model, {"": "disk"})).keys() == {"deep.layers.0", "deep.layers.1"}
    for given in ("Deep", ["Deep"], {"Deep", "Other"}):
        assert names(plan(model, {"": "disk"}, no_split_module_classes=given)).keys() == {"deep"}


def test_a_module_whose_child_is_never_called_is_one_page():
    model = nn.Module()
    model.attention = nn.MultiheadAttention(8, 2)
    assert names(plan(model, {"": "disk"})).keys() == {"attention"}


def test_elements_of_sequentials_and_dicts_are_pages():
    model = nn.Sequential(
        nn.Linear(2, 2),
        nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)),
        nn.ModuleDict({"a": nn.Linear(2, 2)}),
    )
    assert names(plan(model, {"": "disk"})).keys() == {"0", "1", "2.a"}


def test_what_is_never_called_asks_through_what_is():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompts = nn.ParameterList([nn.Parameter(torch.ones(2))])
            self.layers = nn.ModuleList([nn.Linear(2, 2)])

        def forward(self, x):
            return self.layers[0](x) + self.prompts[0]

    found = plan(Holder(), {"": "disk"})
    page = found.page_of("prompts.0")
    assert page.askers == ("",)
    assert page.outer


def test_buffers_stay_on_the_execution_device():
    model = make(blocks=1)
    model.register_buffer("cache", torch.ones(3), persistent=False)
    found = plan(model, {"": "disk"})
    assert set(found.resident) == {"cache", "blocks.0.scale"}
    found = plan(model, {"": "disk"}, offload_buffers=True)
    assert set(found.resident) == {"cache"}
    assert "blocks.0.scale" in found.page_of("blocks.0.scale").tensors


def test_the_cpu_is_a_home_only_when_execution_is_elsewhere():
    model = make()
    assert plan_pages(model, specs_of(model), {"": "cpu"}, execution_device="cpu").pages == ()
    found = plan_pages(model, specs_of(model), {"": "cpu"}, execution_device="meta")
    assert {page.home for page in found.pages} == {"cpu"}


def test_other_devices_get_their_inputs_moved():
    model = make(blocks=3)
    found = plan(model, {"": "cpu", "blocks": "disk", "blocks.1": "meta"}, page_cpu=False)
    assert found.resident["blocks.1.up.weight"] == torch.device("meta")
    cpu = torch.device("cpu")
    cpu = dict.fromkeys(("embedding", "blocks.0", "blocks.2", "norm", "head"), torch.device("cpu"))
    assert found.moved == {"blocks.1": torch.device("meta"), **cpu}
    # the head executes where the weight is that it shares
    found = plan(model, {"": "cpu", "embedding": "meta"}, page_cpu=False)
    assert found.moved["head"] == found.moved["embedding"] == torch.device("meta")
    assert plan(model, {"": "disk"}).moved == {}


def test_bytes_are_exact():
    found = plan(make(blocks=2), {"": "cpu", "blocks": "disk"})
    size = {page.name: page.layout.nbytes for page in found.pages}
    assert found.arena_nbytes == sum(-(-size[name] // 4096) * 4096 for name in ("Net", "embedding", "norm"))
    assert found.store_nbytes == sum(-(-size[f"blocks.{i}"] // 4096) * 4096 for i in range(2))
    assert found.slot_nbytes == size["blocks.0"]
    assert found.device_nbytes(2) == 2 * size["blocks.0"] + size["Net"]
    assert found.device_nbytes(99) == 4 * size["blocks.0"] + size["Net"]


def test_maps_that_do_not_fit_the_model_are_refused():
    with pytest.raises(PlanError, match=r"leaves out 'position', 'embedding.weight', .* and \d+ more"):
        plan(make(), {"blocks": "disk"})
    with pytest.raises(PlanError, match=r"names 'block', .*did you mean 'blocks'"):
        plan(make(), {"": "disk", "block": "cpu"})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_an_accelerator_that_is_not_there_is_named():
    with pytest.raises(PlanError, match="asks for accelerator 3"):
        plan(make(), {"": 3, "blocks": "disk"})


def test_planning_changes_nothing():
    with torch.device("meta"):
        model = Net(blocks=2)
    before = {name: id(p) for name, p in model.named_parameters()}
    plan(model, {"": "disk"})
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert "_hf_hook" not in model.__dict__
