from __future__ import annotations

import pytest
import torch
from torch import nn

from tuckaway.config import QuantizationConfig
from tuckaway.errors import PlanError
from tuckaway.plan import choose_specs, memory_footprint, quantization_report, tied_groups
from tuckaway.tensor import quantize


def model_of(layers: int = 3) -> nn.Module:
    h = nn.ModuleList(
        [nn.ModuleDict({"fc": nn.Linear(64, 64), "norm": nn.LayerNorm(64)}) for _ in range(layers)]
    )
    return nn.ModuleDict(
        {"embed": nn.Embedding(10, 64), "h": h, "bn": nn.BatchNorm1d(4), "head": nn.Linear(64, 10)}
    )


@pytest.fixture
def report():
    model = model_of()
    model["head"].weight = model["embed"].weight
    specs, reasons = choose_specs(model, QuantizationConfig(format="int8"))
    device_map = {"": 0, "h.1": "cpu", "h.2": "disk", "head": "cpu"}
    return quantization_report(specs, reasons, device_map, ties=tied_groups(model))


def test_rows(report):
    rows = {row.name: row for row in report.rows}
    assert "head.weight" not in rows
    assert rows["embed.weight"].aliases == ("head.weight",)
    assert rows["embed.weight"].device == 0  # a tied tensor is where its fastest name is
    assert rows["h.1.fc.weight"].format == "int8"
    assert rows["h.1.fc.weight"].nbytes == 64 * 64 + 64 * 4
    assert rows["h.1.fc.weight"].reason is None
    assert rows["h.1.fc.weight"].device == "cpu"
    assert rows["h.1.fc.bias"].format == "bfloat16"
    assert rows["h.1.fc.bias"].reason == "one-dimensional"
    assert rows["bn.num_batches_tracked"].is_buffer


def test_totals(report):
    assert len(report.quantized) == 3
    assert report.nbytes == sum(report.bytes_by_device().values()) == sum(report.bytes_by_format().values())
    assert set(report.bytes_by_device()) == {0, "cpu", "disk"}
    assert report.reasons()["one-dimensional"] == 11
    assert "a buffer" not in report.reasons()
    assert sum(report.reasons().values()) == len(report.unquantized)


def test_bytes_are_those_of_the_model():
    model = model_of()
    config = QuantizationConfig(compute_dtype=torch.float32)
    specs, reasons = choose_specs(model, config)
    for layer in model["h"]:
        layer["fc"].weight = nn.Parameter(quantize(layer["fc"].weight, config), requires_grad=False)
    assert quantization_report(specs, reasons).nbytes == memory_footprint(model)


def test_the_table(report):
    text = str(report)
    lines = text.splitlines()
    assert lines[0].split() == ["tensors", "format", "shape", "bytes", "on", "not", "quantized", "because"]
    assert any(line.startswith("h.0.fc.weight") and "int8" in line and "GPU 0" in line for line in lines)
    assert "3 of 16 parameters quantized" in text
    assert "placed: GPU 0" in text
    assert not any(line.endswith(" ") for line in lines)


def test_layers_of_one_kind_are_one_line():
    model = model_of(12)
    specs, reasons = choose_specs(model, None)
    text = str(quantization_report(specs, reasons))
    assert "h.{0-11}.fc.weight" in text
    assert "196.61 kB" in text
    assert "placed" not in text


def test_a_map_that_leaves_something_out():
    model = model_of()
    with pytest.raises(PlanError, match=r"leaves out .embed\.weight."):
        quantization_report(*choose_specs(model, None), {"h": 0})


def test_what_the_checkpoint_holds_otherwise_says_so():
    model = nn.Linear(64, 64)
    specs, _ = choose_specs(model, None)
    row = quantization_report(specs, {}).rows[0]
    assert row.reason == "the checkpoint holds it unquantized"


def test_an_empty_model():
    assert "0 of 0 parameters" in str(quantization_report({}, {}))
