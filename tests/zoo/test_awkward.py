"""Modules written by hand, one test a module and format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tuckaway
from zoo.awkward_models import AWKWARD, sequence
from zoo.harness import CONFIGS, check_model, one_thread

QUANTIZED = {
    "Closure": {"mlp.c_fc.weight", "mlp.c_proj.weight"},
    "Convolutions": {"one.weight", "grouped.weight", "two_b.weight", "two.weight", "three.weight"},
    "Codes": {"w.weight"},
    "Einsum": {"q", "o", "w"},
    "FusedQKV": {"qkv.weight", "out"},
    "Lists": {"ws.0", "ws.1", "ws.2", "named.up", "named.down"},
    "LowRank": {"weight"},
    "OddParameters": {"unused", "w"},
    "Recurrent": {"inp.weight"},
    "SharedModule": {"one.weight", "layers.1.weight"},
    "Tied": {"c"},
    "ExpertsEager": {"up", "down", "gate.weight"},
    "ExpertsBatched": {"up", "down", "gate.weight"},
    "ExpertsGrouped": {"up", "down", "gate.weight"},
}
"""What must be quantized, by the names that the report gives; of the others, something."""


@pytest.mark.filterwarnings("ignore:.*not in TorchScript's list:UserWarning")
@pytest.mark.parametrize("format", CONFIGS)
@pytest.mark.parametrize("name", AWKWARD)
def test_module(name: str, format: str, tmp_path: Path) -> None:
    build = AWKWARD[name]
    with one_thread():
        report = check_model(
            lambda: build().eval(),
            lambda _: sequence(),
            tuckaway.save_model,
            format,
            tmp_path,
            quantize_head=True,
        )
    found = {row.name for row in report.quantized}
    assert found == QUANTIZED.get(name, found)
    assert found


@pytest.mark.parametrize("name", sorted(AWKWARD.keys() - {"Recurrent", "Codes"}))
def test_gradients_flow_through_to_the_input(name: str) -> None:
    """What training an adapter before the module needs."""
    torch.manual_seed(0)
    model = tuckaway.load_and_quantize_model(AWKWARD[name]().eval(), CONFIGS["nf4"], device_map={"": "cpu"})
    (x,) = sequence()
    x.requires_grad_()
    result = model(x)
    assert result.requires_grad
    result.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
