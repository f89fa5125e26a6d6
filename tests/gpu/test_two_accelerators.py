"""One model over two GPUs, RAM and disk."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import tuckaway
from paging_models import page, tokens, wide_net
from tuckaway.errors import NonFiniteError
from tuckaway.plan.allocator import UNSPLIT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two accelerators"),
]

WIDTH = 2304
"""Codes of 2.5 MiB in nf4: cut out of large blocks."""
MAP = {"0": 0, "1": 1, "2": 1, "3": "cpu", "4": "disk", "5": 0, "6": 1, "7": 0}


def stack() -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(8)])


def empty() -> nn.Sequential:
    with tuckaway.init_empty_weights():
        return stack()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tuckaway.save_model(stack(), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_pages_come_to_a_model_on_two(tmp_path):
    device_map = {"": 0, "blocks.2": 1, "blocks.3": 1, "blocks.4": "cpu", "blocks.5": "disk", "norm": 1}
    resident = wide_net(None, "cuda").to("cuda")
    model = page(wide_net(None, "cuda"), device_map, tmp_path, execution_device=0)
    x = tokens().to("cuda")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), resident(x))


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_a_checkpoint_loads_over_two_and_gives_the_same_bits(checkpoint, tmp_path, format):
    config = tuckaway.QuantizationConfig(format=format, quantize_head=True)
    one = tuckaway.load_and_quantize_model(empty(), config, checkpoint, {"": 0})
    plan = tuckaway.plan(empty(), config, MAP, reserve_bytes=0)
    before = [torch.cuda.memory_allocated(device) for device in (0, 1)]
    two = tuckaway.load_and_quantize_model(
        empty(), config, checkpoint, plan, offload_folder=tmp_path / "pages"
    )
    for device in (0, 1):
        memory = plan.on(device)
        used = torch.cuda.memory_allocated(device) - before[device]
        assert 0 <= memory.weights_bytes + memory.padding_bytes - used <= UNSPLIT
    assert {two[1].weight.device.index, two[2].bias.device.index} == {1}
    x = torch.randn(5, WIDTH, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(two(x), one(x))


def test_values_without_a_scale_are_found_on_both(checkpoint, tmp_path):
    torch.manual_seed(0)
    broken = stack()
    with torch.no_grad():
        broken[0].weight[3, 4] = math.nan
        broken[2].weight[:2, 7] = math.inf
    tuckaway.save_model(broken, tmp_path / "broken")
    with pytest.raises(NonFiniteError, match=r"'0\.weight' \(1\), '2\.weight' \(2\)"):
        tuckaway.load_and_quantize_model(empty(), "nf4", tmp_path / "broken", {**MAP, "3": 1, "4": 0})


@pytest.mark.parametrize(
    ("name", "budget", "used"),
    [
        ("auto", {0: "85MB", 1: "85MB"}, {0, 1}),
        ("sequential", {0: "85MB", 1: "85MB"}, {0, 1}),
        ("balanced", None, {0, 1}),
        ("balanced_low_0", None, {1}),
    ],
)
def test_named_maps(checkpoint, name, budget, used):
    """85 MB are 70 for the load's pieces, and 15 for 22 MB of weights."""
    config = tuckaway.QuantizationConfig(format="nf4", quantize_head=True)
    one = tuckaway.load_and_quantize_model(empty(), config, checkpoint, {"": 0})
    two = tuckaway.load_and_quantize_model(empty(), config, checkpoint, name, max_memory=budget)
    assert {parameter.device.index for parameter in two.parameters()} == used
    x = torch.randn(5, WIDTH, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(two(x).to("cuda:0"), one(x))


def test_pages_come_back_to_one_of_them(checkpoint, tmp_path):
    config = tuckaway.QuantizationConfig(format="nf4", quantize_head=True)
    model = tuckaway.load_and_quantize_model(
        empty(), config, checkpoint, MAP, offload_folder=tmp_path / "pages"
    )
    x = torch.randn(5, WIDTH, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        want = model(x)
        model = tuckaway.materialize(model)
        assert {model[int(name)].weight.device.index for name, place in MAP.items() if place != 1} == {0}
        model = model.to("cuda:1")
        assert {parameter.device.index for parameter in model.parameters()} == {1}
        assert torch.equal(model(x.to("cuda:1")).to("cuda:0"), want)
