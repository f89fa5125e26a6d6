"""The files beside the weights: carried, rewritten, or left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import tuckaway
from tuckaway import quantize_checkpoint
from tuckaway.errors import CheckpointError, UnsafePathError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tuckaway.save_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), tmp_path / "source")
    return tmp_path / "source"


def test_what_is_carried_along(source, tmp_path):
    kept = [
        "tokenizer.json",
        "tokenizer.model",
        "generation_config.json",
        "chat_template.jinja",
        "LICENSE",
        "m.py",
    ]
    for name in [*kept, "pytorch_model.bin", "model.gguf", "x.safetensors.index.json", ".hidden"]:
        (source / name).write_text(f'"{name}"')
    (source / "folder").mkdir()
    quantize_checkpoint(source, tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {*kept, "model.safetensors", "conversion.json"}
    assert (tmp_path / "out" / "LICENSE").read_text() == '"LICENSE"'


def test_the_configuration(source, tmp_path):
    config = {"a": [1, {"b": None}], "torch_dtype": "float32", "quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(config))
    quantize_checkpoint(source, tmp_path / "out", tuckaway.QuantizationConfig(compute_dtype=torch.float16))
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["a"] == [1, {"b": None}]
    assert found["dtype"] == "float16"
    assert "torch_dtype" not in found
    assert found["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert found["quantization_config"]["llm_int8_skip_modules"] == ["1"]


def test_nothing_to_quantize_is_no_quantization(tmp_path):
    tuckaway.save_model(nn.LayerNorm(64), tmp_path / "source")
    (tmp_path / "source" / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    quantize_checkpoint(tmp_path / "source", tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_link_out_of_the_source_is_refused(source, tmp_path):
    (tmp_path / "secret").write_text("x")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafePathError, match="out of the checkpoint's folder"):
        quantize_checkpoint(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "source"]


def test_a_broken_configuration_is_refused(source, tmp_path):
    (source / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read the configuration"):
        quantize_checkpoint(source, tmp_path / "out")
