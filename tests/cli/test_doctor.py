from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tuckaway
from tuckaway.cli.app import app


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUCKAWAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_what_the_machine_has() -> None:
    out = run()
    for word in ("torch", "Triton", "RAM", "locked memory", "tuckaway doctor --measure"):
        assert word in out


def test_measured_speeds_are_remembered_and_planned_with(cache: Path, tiny_llama: Path) -> None:
    measured = json.loads(run("--measure", "--json"))["facts"]["speeds"]
    assert [path.name for path in cache.iterdir()] == ["speeds.json"]
    assert measured["host"] > 1e8
    assert measured["page_cache"] > 1e7
    assert json.loads(run("--json"))["facts"]["speeds"] == measured
    plan = tuckaway.plan(tiny_llama)
    assert plan.speeds is not None
    assert plan.speeds.to_dict() == measured
    assert plan.expected.tokens_per_second() == pytest.approx(measured["host"] / plan.weights_bytes, rel=0.5)
    assert plan.expected.warm_load_seconds is not None
