"""The command that plans: tables for people, JSON for programs, and an exit status for scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tuckaway
from tuckaway.cli.app import app
from tuckaway.cli.main import main


@pytest.fixture(autouse=True)
def _never_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUCKAWAY_CACHE", str(tmp_path / "no-speeds"))


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    return result.exit_code, result.stdout


def test_tables(tiny_llama: Path) -> None:
    status, out = run(tiny_llama, "--max-memory", "0=2MB,cpu=1GB", "--length", "16", "--reserve", "0")
    assert status == 0
    assert "model.layers.{0-5}" in out
    for word in ("GPU 0", "slots", "padding", "reserve", "tuckaway doctor"):
        assert word in out


def test_json_picture_and_saved_plan(tiny_llama: Path, tmp_path: Path) -> None:
    status, out = run(
        tiny_llama, "--format", "int8", "--device-map", "model.layers=disk,model=cpu,lm_head=cpu", "--json",
        "--picture", tmp_path / "plan.svg", "--save", tmp_path / "plan.json",
    )  # fmt: skip
    found = json.loads(out)
    plan = tuckaway.Plan.load(tmp_path / "plan.json")
    assert status == 0
    assert found["fits"] is True
    assert tuckaway.Plan.from_dict(found["plan"]) == plan
    assert found["weights_bytes"] == plan.weights_bytes
    assert found["paged_bytes"] == plan.paged_bytes > 0
    assert (tmp_path / "plan.svg").read_text() == plan.picture()


def test_what_does_not_fit_is_status_1_and_says_by_how_much(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [str(tiny_llama), "--max-memory", "cpu=100kB,disk=0", "--reserve", "0"]
    status, out = run(*options, "--json")
    found = json.loads(out)
    assert (status, found["fits"]) == (1, False)
    assert found["shortfall_bytes"] > 0
    assert str(found["shortfall_bytes"]) in found["error"]
    monkeypatch.setattr("sys.argv", ["tuckaway", "plan", *options])
    with pytest.raises(SystemExit, match=r"tuckaway: .* bytes"):
        main()


def test_fit_chooses_the_format(tiny_llama: Path) -> None:
    for size, expected in (("1MB", "bfloat16"), ("330kB", "int8")):
        _, out = run(tiny_llama, "--fit", "--max-memory", f"cpu={size}", "--reserve", "0", "--json")
        formats = {name for block in json.loads(out)["plan"]["blocks"] for name in block["formats"]}
        assert expected in formats


def test_options_that_cannot_be(tiny_llama: Path) -> None:
    assert run(tiny_llama, "--max-memory", "lots")[0] == 2
    assert run(tiny_llama, "--reserve", "much")[0] == 2
    assert run(tiny_llama, "--batch", "0")[0] == 2
