from __future__ import annotations

import warnings

import accelerate
import pytest
import torch
from torch import nn

from tuckaway.config import QuantizationConfig
from tuckaway.plan import balance as module
from tuckaway.plan import choose_specs, compute_module_sizes, get_balanced_memory, infer_auto_device_map


def stack(layers: int = 12) -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(layers)])


def theirs(model, max_memory, whole, low_zero):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return accelerate.utils.get_balanced_memory(model, dict(max_memory), whole, low_zero=low_zero)


@pytest.mark.parametrize(
    "max_memory",
    [
        {"cpu": 1000},
        {0: 10**6},
        {0: 10**6, 1: 10**6},
        {0: 10**6, 1: 10**6, 2: 10**6, "cpu": 10**6},
        {0: 500, 1: 10**6, 2: 10**6},
        {0: 10**6, 1: 0, 2: 10**6},
    ],
)
@pytest.mark.parametrize("whole", [None, ["Linear"], ["Sequential"]])
@pytest.mark.parametrize("low_zero", [False, True])
def test_as_accelerate(max_memory, whole, low_zero):
    if low_zero and max_memory.get(1) == 0:
        pytest.skip("accelerate numbers the devices it counts from 0 on, used or not")
    model = stack()
    assert get_balanced_memory(model, max_memory, whole, low_zero=low_zero) == theirs(
        model, max_memory, whole, low_zero
    )


def test_the_model_is_spread():
    model = stack()
    total = compute_module_sizes(model)[""]
    budgets = get_balanced_memory(model, {0: 10**6, 1: 10**6, 2: 10**6}, ["Sequential"])
    device_map = infer_auto_device_map(model, budgets, ["Sequential"])
    counts = [list(device_map.values()).count(gpu) for gpu in range(3)]
    assert sum(counts) == 12
    assert max(counts) <= 5
    assert max(budgets[0], budgets[1]) < total


def test_low_zero_leaves_the_first_to_others():
    budgets = get_balanced_memory(stack(), {0: 10**6, 1: 10**6, 2: 10**6}, low_zero=True)
    assert budgets[0] == 0


def test_specs_make_the_shares_exact():
    model = nn.Sequential(*[nn.Linear(128, 128, bias=False) for _ in range(8)])
    specs, _ = choose_specs(model, QuantizationConfig(format="int8", skip_modules=[]))
    budgets = get_balanced_memory(model, {0: 10**9, 1: 10**9}, specs=specs)
    one = 128 * 128 + 128 * 4
    assert budgets[0] == 4 * one + int(1.25 * one)


def test_one_accelerator_keeps_a_tenth_for_activations(monkeypatch):
    monkeypatch.setattr(
        module, "get_max_memory", lambda given: {0: 1000, "cpu": 5000} if given is None else dict(given)
    )
    assert get_balanced_memory(stack()) == {0: 900, "cpu": 5000}
    assert get_balanced_memory(stack(), {0: 1000}) == {0: 1000}


def test_dtype():
    model = stack().to(torch.float32)
    whole = get_balanced_memory(model, {0: 10**6, 1: 10**6})[0]
    assert get_balanced_memory(model, {0: 10**6, 1: 10**6}, dtype=torch.float16)[0] == whole // 2
