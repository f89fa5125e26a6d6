"""A model by its name: how it is built, what it is quantized to, and what is left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tuckaway.cli.model import build, load, quantization_config, tokenizer_of
from tuckaway.cli.options import DeviceMap
from tuckaway.config import QuantizationConfig
from tuckaway.errors import CheckpointNotFound, ConfigError


def test_built_empty_with_its_blocks(tiny_llama: Path) -> None:
    built = build(str(tiny_llama))
    assert all(p.is_meta for p in built.network.parameters())
    assert not built.network.training
    assert built.blocks == [f"model.layers.{i}" for i in range(6)]
    embedding = 257 * 64
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert built.parameters == embedding + 6 * layer + 64  # the head is tied to the embedding


def test_the_makers_generation_config_is_taken(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [256, 7]}')
    assert build(str(tmp_path)).network.generation_config.eos_token_id == [256, 7]
    (tmp_path / "generation_config.json").unlink()
    assert build(str(tmp_path)).network.generation_config.eos_token_id == 256


def test_what_a_model_is_quantized_to(tiny_llama: Path) -> None:
    built = build(str(tiny_llama))
    usual = torch.bfloat16 if torch.accelerator.is_available() else torch.float32
    assert quantization_config(built, None) == QuantizationConfig("nf4", compute_dtype=usual)
    assert quantization_config(built, "int8", "fp16") == QuantizationConfig(
        "int8", compute_dtype=torch.float16
    )
    assert quantization_config(built, "none") is None
    built.network.config.quantization_config = QuantizationConfig("fp4", skip_modules=["a"]).to_bitsandbytes()
    own = quantization_config(built, None)
    assert own == QuantizationConfig("fp4", skip_modules=["a"], compute_dtype=usual)
    assert quantization_config(built, "nf4") == QuantizationConfig("nf4", compute_dtype=usual)


def test_nothing_is_left_of_a_temporary_offload_folder(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    built = build(str(tiny_llama))
    with load(built, quantization_config(built, "nf4"), device_map=DeviceMap({"": "disk"})) as loaded:
        assert loaded.seconds > 0
        assert any(tmp_path.iterdir())
        loaded.network(torch.ones(1, 3, dtype=torch.int64))
    assert not any(tmp_path.iterdir())


def test_unquantized_in_the_dtype_asked_for(tiny_llama: Path) -> None:
    built = build(str(tiny_llama))
    with load(built, None, dtype="bf16") as loaded:
        assert {p.dtype for p in loaded.network.parameters()} == {torch.bfloat16}


def test_what_is_not_there(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="Hub"):
        build(str(tmp_path / "nothing"))
    shutil.copy(tiny_llama / "config.json", tmp_path)
    with pytest.raises(CheckpointNotFound):
        tokenizer_of(build(str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigError, match="any torch"):
        build(str(tmp_path))
