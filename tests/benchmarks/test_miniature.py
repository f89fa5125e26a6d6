"""Benchmarks that are run where time is short: every case is tried at small sizes, and what is cut short is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, out: Path, *arguments: str) -> dict[str, Any]:
    """Run a benchmark in miniature and return what it wrote."""
    command = [sys.executable, f"benchmarks/{script}.py", *arguments, "--miniature", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.glob("*.json")
    written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert written["conditions"]["versions"]["torch"]
    results: dict[str, Any] = written["results"]
    return results


def assert_whole(results: dict[str, Any]) -> None:
    """Check that nothing failed, was wrong, or was left out."""
    assert [row for row in results["results"] if "failed" in row or "wrong" in row] == []
    assert results["not_measured_for_want_of_time"] == []


@pytest.mark.slow
def test_kernels(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    results = run("kernels", tmp_path)
    assert_whole(results)
    measured = {row["what"] for row in results["results"]}
    assert {"nf4", "nf4 nested", "LLM.int8(), threshold 6", "bf16", "torch int4"} <= measured
    assert {"quantize nf4 nested", "bitsandbytes nf4", "bitsandbytes LLM.int8(), threshold 6"} <= measured
    assert all("us" in row or "host_us" in row for row in results["results"] if "m" in row)


@pytest.mark.slow
def test_decode(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    results = run("decode", tmp_path, "--layers", "2")
    assert_whole(results)
    found = {(row["model"], row["what"]): row["tokens_s"] for row in results["results"]}
    for what in ("step, captured", "generate, eager", "step, eager"):
        assert found["nf4 nested", what] > 0
        assert found["bf16", what] > 0
    assert found["bitsandbytes nf4 nested", "generate, eager"] > 0
    assert found["nf4 nested", "step, small operations compiled, captured"] > 0
    assert found["nf4 nested", "step, layers compiled, captured"] > 0


@pytest.mark.slow
def test_gpt2_xl(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    results = run("gpt2_xl", tmp_path / "out", str(folder), "--only", "guide", "all on disk")
    assert_whole(results)
    assert len(results["results"]) == 3
    assert all(row["token_ms"] > 0 for row in results["results"])


@pytest.mark.slow
def test_paging(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "pages"
    folder.mkdir()
    results = run("paging", tmp_path / "out", str(folder), "--layers", "4", "--prompt", "64")
    assert_whole(results)
    found = {(row["format"], row["layers"], row["what"]) for row in results["results"]}
    for layers in ("resident", "ram", "disk, warm, 2 slots", "disk, warm, 4 slots", "half in ram, 2 slots"):
        assert ("nf4", layers, "step, captured") in found
        assert ("nf4", layers, "step, eager") in found
    assert {("nf4", "ram", "prompt of 64, eager"), ("nf4", "disk, cold", "step, captured")} <= found
    assert ("bf16", "ram", "step, eager") in found
    assert ("int8", "gpt2-xl, the guide's map", "step, captured") in found
    assert ("accelerate, bf16", "ram", "step, eager") in found
    assert ("accelerate + bitsandbytes, nf4", "ram", "step, eager") in found


@pytest.mark.slow
def test_plan_accuracy(tmp_path: Path) -> None:
    """Eight kinds of models under four maps: planned bytes are those in use."""
    results = run("plan_accuracy", tmp_path)
    assert_whole(results)
    assert len(results["results"]) == 32
    assert all(row["holds"] for row in results["results"])


@pytest.mark.slow
def test_loading(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    results = run("loading", tmp_path / "out", "--scratch", str(tmp_path))
    assert_whole(results)
    found = {row["what"]: row for row in results["results"]}
    assert found["tuckaway, llama-7b"]["int8"]["bytes_per_second"] > 0
    assert found["tuckaway, gpt2-xl"]["nf4, cold"]["seconds"] > 0
    assert found["tuckaway, llama-7b, converted"]["reload of nf4, unverified"]["seconds"] > 0
    assert found["transformers + bitsandbytes, llama-7b, nf4"]["seconds"] > 0
    assert "safetensors, gpt2-xl, fp32" in found


def test_what_does_not_fit_the_budget_is_named(tmp_path: Path) -> None:
    results = run("kernels", tmp_path, "--budget", "0", "--only", "conversions")
    assert [row["what"] for row in results["results"]] == ["limits"]
    left_out = [row["what"] for row in results["not_measured_for_want_of_time"]]
    assert left_out == ["quantize nf4", "dequantize nf4", "quantize nf4 nested", "dequantize nf4 nested"]
