"""The journal of a benchmark: nothing that was found is lost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks.common import Journal

from benchmarks import common


def written(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "name.json").read_text(encoding="utf-8"))["results"]
    return results


def test_every_result_is_written_at_once(tmp_path: Path) -> None:
    journal = Journal("name", 60.0, tmp_path)
    for i in range(3):
        journal.case({"m": i}, lambda i=i: {"us": float(i)})
        assert written(tmp_path)["results"] == [{"m": n, "us": float(n)} for n in range(i + 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["name.json"]


def test_a_failure_is_a_result(tmp_path: Path) -> None:
    journal = Journal("name", 60.0, tmp_path)

    def fail() -> dict[str, Any]:
        raise KeyError("gone")

    journal.case({"m": 1}, fail)
    journal.case({"m": 2}, lambda: {"us": 1.0})
    first, second = written(tmp_path)["results"]
    assert first["m"] == 1
    assert "KeyError('gone')" in first["failed"]
    assert "test_common.py" in first["failed"]
    assert second == {"m": 2, "us": 1.0}


def test_the_budget_ends_a_case(tmp_path: Path) -> None:
    journal = Journal("name", 1.2, tmp_path)
    began = time.monotonic()
    journal.case({"m": 1}, lambda: time.sleep(60) or {"us": 1.0})
    assert time.monotonic() - began < 30
    assert "TimeoutError" in written(tmp_path)["results"][0]["failed"]
    journal.case({"m": 2}, lambda: {"us": 1.0})
    journal.save()
    assert written(tmp_path)["not_measured_for_want_of_time"] == [{"m": 2}]


def test_a_part_that_fails_between_its_cases_is_a_result(tmp_path: Path) -> None:
    journal = Journal("name", 60.0, tmp_path)

    def part() -> None:
        journal.case({"m": 1}, lambda: {"us": 1.0})
        raise RuntimeError("gone")

    journal.attempt("first", part)
    journal.attempt("second", part, needs=100.0)
    journal.save()
    first, second = written(tmp_path)["results"]
    assert first == {"m": 1, "us": 1.0}
    assert second["part"] == "first"
    assert "gone" in second["failed"]
    assert written(tmp_path)["not_measured_for_want_of_time"] == [{"part": "second"}]


def test_a_script_in_a_process_of_its_own_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    (tmp_path / "one.py").write_text("import sys; print('RESULT', sys.argv[1])")
    (tmp_path / "two.py").write_text("raise SystemExit('it broke')")
    (tmp_path / "three.py").write_text("import time; time.sleep(60)")
    (tmp_path / "four.py").write_text("print('RESULT {\"s\": 1}', flush=True); import time; time.sleep(60)")
    assert common.in_process("one.py", ['{"s": 1}'], 60.0) == {"s": 1}
    assert common.in_process("four.py", [], 1.0) == {"s": 1, "failed": "took longer than 1 s"}
    with pytest.raises(RuntimeError, match="it broke"):
        common.in_process("two.py", [], 60.0)
    with pytest.raises(TimeoutError, match="longer than 1 s"):
        common.in_process("three.py", [], 1.0)
