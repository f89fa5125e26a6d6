from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tuckaway.config import QuantizationConfig
from tuckaway.empty import init_empty_weights
from tuckaway.errors import PlanError
from tuckaway.plan import (
    accounts,
    choose_specs,
    compute_module_sizes,
    executing_device,
    place_of,
    resolve_device_map,
)

NF4 = QuantizationConfig()


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        self.register_buffer("mask", torch.ones(width, dtype=torch.bool))

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)))


class LM(nn.Module):
    def __init__(self, width: int = 64, layers: int = 6, words: int = 1000, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.h = nn.ModuleList([Layer(width) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.register_buffer("inv_freq", torch.ones(8), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.h:
            x = layer(x)
        return self.head(self.norm(x))


def planned(config=NF4, **options):
    with init_empty_weights():
        model = LM(**options)
    return model, choose_specs(model, config)[0]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Toy weights are loaded in toy pieces: slots are what counts, as it is with real ones."""
    monkeypatch.setattr(accounts, "PIECE_BYTES", 1024)


def bytes_needed(model, specs, device_map, main, offload_buffers=False, slots=2, reserve=0):
    """Bytes on the executing device at the peak, and its pages."""
    found = accounts.account(
        model,
        specs,
        device_map,
        main=main,
        offload_buffers=offload_buffers,
        slots=slots,
        reserve_bytes={main: reserve},
    )
    return found.devices[main].counted_bytes, found.pages


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_none_is_all_on_what_executes():
    assert resolve_device_map(*planned(), None) == {"": "cpu"}


def test_none_is_the_current_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    assert resolve_device_map(*planned(), None) == {"": 1}


@pytest.mark.parametrize(
    ("given", "expected"),
    [("cpu", "cpu"), ("disk", "disk"), (0, 0), (torch.device("cuda", 1), 1), ("cuda:0", 0)],
)
def test_one_device_is_everything_there(given, expected):
    assert resolve_device_map(*planned(), given) == {"": expected}


def test_a_misspelt_name():
    with pytest.raises(PlanError, match=r"'blanced' is no device map.*'balanced'"):
        resolve_device_map(*planned(), "blanced")


def test_a_dict_is_checked_and_read():
    model, specs = planned()
    given = {"embed": torch.device("cuda:0"), "h": "cpu", "norm": "disk", "head": "cuda:1", "inv_freq": 0}
    assert resolve_device_map(model, specs, given) == {
        "embed": 0,
        "h": "cpu",
        "norm": "disk",
        "head": 1,
        "inv_freq": 0,
    }
    with pytest.raises(PlanError, match=r"leaves out 'norm\.weight'"):
        resolve_device_map(model, specs, {"embed": 0, "h": 0, "head": 0})
    with pytest.raises(PlanError, match="did you mean 'embed'"):
        resolve_device_map(model, specs, {"": 0, "embd": 0})


def test_a_dict_may_leave_out_what_is_no_part_of_the_state():
    model, specs = planned()
    found = resolve_device_map(model, specs, {"embed": 0, "h": "cpu", "norm": 0, "head": 0})
    assert found["inv_freq"] == 0


def test_what_fits_is_not_split():
    model, specs = planned()
    total = compute_module_sizes(model, specs=specs)[""]
    need, _ = bytes_needed(model, specs, {"": 0}, 0)
    assert resolve_device_map(model, specs, "sequential", max_memory={0: need, "cpu": 10**9}) == {"": 0}
    assert resolve_device_map(model, specs, "sequential", max_memory={0: need - 1, "cpu": 10**9}) != {"": 0}
    assert resolve_device_map(model, specs, "auto", max_memory={"cpu": total}) == {"": "cpu"}


@pytest.mark.parametrize("name", ["auto", "balanced", "balanced_low_0", "sequential"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.65, 0.8, 0.95])
@pytest.mark.parametrize("main", [0, "cpu"])
def test_the_executing_device_is_never_overfilled(name, tied, offload_buffers, share, main):
    model, specs = planned(tied=tied, layers=12, words=700)
    limit = int(compute_module_sizes(model, specs=specs)[""] * share)
    limits = {0: limit, "cpu": 10**9} if main == 0 else {"cpu": limit}
    found = resolve_device_map(model, specs, name, max_memory=limits, offload_buffers=offload_buffers)
    need, pages = bytes_needed(model, specs, found, main, offload_buffers)
    assert need <= limit
    # and what is left would not hold one layer more
    layer = compute_module_sizes(model, specs=specs)["h.0"]
    assert need + 2 * layer + 4096 > limit
    for i in range(12):
        assert len({place_of(n, found) for n in specs if n.startswith(f"h.{i}.")}) == 1
    if tied:
        assert place_of("embed.weight", found) == place_of("head.weight", found)
    assert pages.pages


def test_the_largest_blocks_stay_where_slots_for_them_would_cost_more():
    model, specs = planned(layers=20, words=4000)
    sizes = compute_module_sizes(model, specs=specs)
    limit = 2 * sizes["embed"] + 8 * sizes["h.0"]
    found = resolve_device_map(model, specs, "auto", max_memory={0: limit, "cpu": 10**9})
    assert place_of("embed.weight", found) == place_of("head.weight", found) == 0
    assert [place_of(f"h.{i}", found) for i in range(20)].count(0) >= 4


def test_ram_and_then_disk():
    model, specs = planned(layers=12)
    sizes = compute_module_sizes(model, specs=specs)
    limits = {0: 2 * sizes["embed"] + 4 * sizes["h.0"], "cpu": 5 * sizes["h.0"]}
    found = resolve_device_map(model, specs, "auto", max_memory=limits)
    assert set(found.values()) == {0, "cpu", "disk"}
    _, pages = bytes_needed(model, specs, found, 0)
    assert pages.arena_nbytes <= limits["cpu"]


def test_several_accelerators():
    model, specs = planned(layers=12)
    total = compute_module_sizes(model, specs=specs)[""]
    found = resolve_device_map(model, specs, "auto", max_memory={0: total, 1: total, "cpu": 10**9})
    assert set(found.values()) == {0, 1}
    found = resolve_device_map(model, specs, "balanced_low_0", max_memory={0: total, 1: total, 2: total})
    assert 0 not in found.values()


def test_one_that_is_to_stay_empty_needs_no_reserve():
    """All of it fits on the second one; what is kept free is kept free there."""
    model, specs = planned()
    total = sum(spec.nbytes for spec in specs.values()) + 2**28
    limits = {0: total, 1: total}
    found = resolve_device_map(model, specs, "balanced_low_0", max_memory=limits, reserve_bytes=2**20)
    assert found == {"": 1}
    assert executing_device("balanced_low_0", limits, placement=found) == 1
    assert executing_device("balanced_low_0", limits, placement={"": "cpu"}) == 0  # to which all is paged


def test_an_accelerator_with_no_budget_is_not_used():
    model, specs = planned()
    assert resolve_device_map(model, specs, "auto", max_memory={0: 0, "cpu": "1GB"}) == {"": "cpu"}


def test_more_slots_leave_less_room():
    model, specs = planned(layers=12)
    sizes = compute_module_sizes(model, specs=specs)
    limits = {0: 2 * sizes["embed"] + 8 * sizes["h.0"], "cpu": 10**9}

    def resident(slots):
        found = resolve_device_map(model, specs, "auto", max_memory=limits, slots=slots)
        return [place_of(f"h.{i}", found) for i in range(12)].count(0)

    assert resident(1) > resident(2) > resident(4)


def test_what_cannot_be_is_said_in_bytes():
    model, specs = planned(words=5000)
    with pytest.raises(
        PlanError, match=r"GPU 0 must hold .* (\d+) bytes more .*raise max_memory\[0\] to (\d+)"
    ) as caught:
        resolve_device_map(model, specs, "auto", max_memory={0: 1000, "cpu": "1GB"})
    enough = int(str(caught.value).split("max_memory[0] to ")[1].split(",")[0])
    found = resolve_device_map(model, specs, "auto", max_memory={0: enough, "cpu": "1GB"})
    assert bytes_needed(model, specs, found, 0)[0] <= enough
    with pytest.raises(PlanError, match="fit nowhere"):
        resolve_device_map(model, specs, "auto", max_memory={0: 10**6, "cpu": 1000, "disk": 1000})


def test_transformers_models_name_their_blocks():
    with init_empty_weights():
        model = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=64, n_head=2, vocab_size=500))
    specs, _ = choose_specs(model, NF4)
    total = compute_module_sizes(model, specs=specs)[""]
    found = resolve_device_map(model, specs, "auto", max_memory={"cpu": total * 3 // 4})
    assert set(found.values()) == {"cpu", "disk"}
    assert place_of("transformer.h.5", found) == "disk"
    assert all(name.count(".") <= 2 for name in found)


def test_the_model_is_not_changed():
    model, specs = planned()
    before = {name: id(p) for name, p in model.named_parameters()}
    limits = {"cpu": "350kB"}
    resolve_device_map(model, specs, "auto", max_memory=limits)
    assert before == {name: id(p) for name, p in model.named_parameters()}
    assert limits == {"cpu": "350kB"}


@pytest.mark.parametrize("share", [0.3, 0.45, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("main", [0, "cpu"])
def test_lists_in_lists_are_pages_as_paging_has_them(main, share):
    with init_empty_weights():
        model = nn.Sequential(
            nn.Embedding(500, 60),
            nn.ModuleList(
                [nn.Sequential(nn.Linear(60, 211), nn.ReLU(), nn.Linear(211, 60)) for _ in range(9)]
            ),
            nn.Linear(60, 500),
        )
    specs, _ = choose_specs(model, NF4)
    limit = int(compute_module_sizes(model, specs=specs)[""] * share) + 80_000
    found = resolve_device_map(
        model, specs, "auto", max_memory={main: limit, **({"cpu": 10**9} if main == 0 else {})}
    )
    need, pages = bytes_needed(model, specs, found, main)
    assert need <= limit
    assert all(page.name.count(".") <= 1 for page in pages.pages)
