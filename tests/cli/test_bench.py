"""What ``tuckaway bench`` measures, as data and as a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from command import invoke

QUICK = ["--prompt-tokens", "8", "--new-tokens", "4", "--repeat", "2"]


def test_json_has_every_run_and_the_conditions(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(monkeypatch, "bench", str(tiny_llama), *QUICK, "--batch", "2", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["format"] == "nf4"
    assert result["load"]["checkpoint_bytes"] == sum(
        path.stat().st_size for path in tiny_llama.glob("*.safetensors")
    ) - _header_bytes(tiny_llama)
    assert len(result["prefill"]["seconds"]) == len(result["decode"]["seconds"]) == 2
    assert (result["prefill"]["tokens"], result["decode"]["tokens"], result["batch"]) == (8, 3, 2)
    median = sum(result["decode"]["seconds"]) / 2
    assert result["decode"]["tokens_per_second"] == pytest.approx(2 * 3 / median)
    assert result["process_peak_bytes"] > 2**20
    assert {"torch", "tuckaway", "python"} <= set(result["conditions"]["versions"])


def _header_bytes(folder: Path) -> int:
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))


def test_perplexity_of_a_text(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox. " * 20)
    options = ["--format", "none", "--perplexity", str(text), "--text-tokens", "300", "--json"]
    assert invoke(monkeypatch, "bench", str(tiny_llama), *QUICK, *options) == 0
    found = json.loads(capsys.readouterr().out)["perplexity"]
    assert (found["tokens"], found["window"]) == (300, 256)  # as many as the model takes
    assert (
        200 < found["value"] < 320
    )  # random weights: about as many as there are tokens in the vocabulary, 257


def test_several_formats_stand_side_by_side(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--format", "nf4", "--format=none"]
    assert invoke(monkeypatch, "bench", str(tiny_llama), *QUICK, *options) == 0
    shown = capsys.readouterr().out
    head = next(line for line in shown.splitlines() if "none" in line)
    assert head.split() == ["nf4", "none"]
    assert all(row in shown for row in ("weights", "loading", "prompt", "answer", "tokens/s"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux drops files from its page cache")
def test_cold(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(monkeypatch, "bench", str(tiny_llama), *QUICK, "--cold", "--json") == 0
    assert 0.0 <= json.loads(capsys.readouterr().out)["load"]["cached_share"] <= 1.0


def test_what_cannot_be_measured(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke(monkeypatch, "bench", str(tiny_llama), "--perplexity", str(tmp_path / "none.txt")) == 2
    assert invoke(monkeypatch, "bench", str(tiny_llama), "--new-tokens", "1") == 2
    (tmp_path / "short.txt").write_text("a")
    message = invoke(
        monkeypatch, "bench", str(tiny_llama), *QUICK, "--perplexity", str(tmp_path / "short.txt")
    )
    assert "fewer than two tokens" in message
