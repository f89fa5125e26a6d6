from __future__ import annotations

import accelerate.utils.modeling as theirs
import pytest
import torch
from torch import nn

from tuckaway.empty import init_empty_weights
from tuckaway.errors import PlanError
from tuckaway.plan import canonical_names, find_tied_parameters, retie_parameters, tied_groups


def tied_model() -> nn.Module:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    model[3].weight = model[1].weight = model[0].weight
    model[2].bias = model[0].bias
    return model


def test_groups_are_accelerates():
    model = tied_model()
    assert find_tied_parameters(model) == [["0.weight", "1.weight", "3.weight"], ["0.bias", "2.bias"]]
    assert sorted(find_tied_parameters(model)) == sorted(theirs.find_tied_parameters(model))


def test_untied_model_has_none():
    assert find_tied_parameters(nn.Linear(2, 2)) == tied_groups(nn.Linear(2, 2)) == []


def test_groups_on_meta_are_told_by_identity():
    with init_empty_weights():
        model = tied_model()
        other = nn.Linear(4, 4)  # every meta tensor has the address 0
    assert find_tied_parameters(model) == find_tied_parameters(tied_model())
    assert find_tied_parameters(other) == []


def test_buffers_and_shared_modules():
    layer = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": layer, "b": layer})
    assert ["a.running_mean", "b.running_mean"] in tied_groups(model)
    assert ["a.weight", "b.weight"] in find_tied_parameters(model)
    assert all(not any("running" in n for n in group) for group in find_tied_parameters(model))


def test_canonical_names_cover_everything():
    model = tied_model()
    names = canonical_names(model)
    assert names["3.weight"] == names["0.weight"] == "0.weight"
    assert set(names) == {n for n, _ in model.named_parameters(remove_duplicate=False)}


def test_retie_takes_the_first_real_one():
    model = tied_model()
    groups = find_tied_parameters(model)
    for layer in model:
        layer.weight = nn.Parameter(torch.empty(4, 4, device="meta"))
    model[1].weight = nn.Parameter(torch.ones(4, 4))
    retie_parameters(model, groups)
    assert find_tied_parameters(model) == groups
    assert model[3].weight.sum() == 16


def test_retie_with_nothing_real_changes_nothing():
    with init_empty_weights():
        model = tied_model()
    weight = model[0].weight
    retie_parameters(model, find_tied_parameters(model))
    assert model[0].weight is weight


def test_retie_an_unknown_name():
    with pytest.raises(PlanError, match=r"'0.wieght'.*did you mean '0.weight'"):
        retie_parameters(tied_model(), [["0.wieght", "1.weight"]])
