"""``tuckaway quantize``: what it makes, what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tuckaway
from command import invoke
from loading import net, read_all


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net")
    tuckaway.save_model(net(), path)
    return path


def test_the_command_does_what_the_function_does(source, tmp_path, monkeypatch, capsys) -> None:
    arguments = ["--format", "int8", "--dtype", "fp16", "--skip", "layers.1", "--max-shard-size", "40KB"]
    assert invoke(monkeypatch, "quantize", str(source), str(tmp_path / "out"), *arguments) == 0
    shown = capsys.readouterr().out
    assert "skipped: 'layers.1'" in shown
    assert str(tmp_path / "out") in shown
    config = tuckaway.QuantizationConfig(format="int8", compute_dtype="fp16", skip_modules=["layers.1"])
    tuckaway.quantize_checkpoint(source, tmp_path / "expected", config, max_shard_size="40KB")
    found, expected = read_all(tmp_path / "out"), read_all(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all((found[key] == value).all() for key, value in expected.items())


def test_json(source, tmp_path, monkeypatch, capsys) -> None:
    assert invoke(monkeypatch, "quantize", str(source), str(tmp_path / "out"), "--json") == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["files"] == ["model.safetensors"]
    assert result["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert result["not_quantized"]["head.weight"] == "the output head"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "nf3"], "unknown format 'nf3'"),
        (["--max-shard-size", "lots"], "lots"),
        (["--skip", "nowhere"], "'nowhere' in skip_modules"),
    ],
)
def test_refusals_are_one_line(source, tmp_path, monkeypatch, arguments, message) -> None:
    error = invoke(monkeypatch, "quantize", str(source), str(tmp_path / "out"), *arguments)
    assert message in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())
