"""The command itself: its help, its exit statuses, and how errors look."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tuckaway
from command import invoke
from tuckaway.cli.app import COMMANDS


def test_help_names_the_invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (COMMANDS[name].__doc__ or "").strip()
    assert invoke(monkeypatch, name, "--help") == 0
    assert "--json" in capsys.readouterr().out


def test_help_imports_no_model_library() -> None:
    code = """
import sys
from tuckaway.cli.main import main
sys.argv = ["tuckaway", "--help"]
try:
    main()
except SystemExit:
    print(*{"bitsandbytes", "gguf", "transformers", "triton"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_wrong_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke(monkeypatch, "demo", "--format", "nf3") == 2
    assert invoke(monkeypatch, "demo", "--max-new-tokens", "0") == 2


def test_option_that_cannot_be_read_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(monkeypatch, "demo", "--max-memory", "lots") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "'lots' is no DEVICE=SIZE" in shown.err


def test_error_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    message = invoke(monkeypatch, "demo", "--model", str(tmp_path))
    assert message.startswith("tuckaway: ")
    assert message.endswith("name a folder with config.json, or an id on the Hub")
    assert "\n" not in message


def test_json_is_all_there_is_on_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_llama: Path
) -> None:
    assert invoke(monkeypatch, "demo", "--model", str(tiny_llama), "--max-new-tokens", "4", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 4
    assert result["bytes_by_format"]["nf4"] > 0


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"tuckaway {tuckaway.__version__}\n"


def test_shells_can_complete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert invoke(monkeypatch, "--show-completion", "bash") == 0
    assert "_TUCKAWAY_COMPLETE=complete_bash" in capsys.readouterr().out


def test_extra_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = builtins.__import__

    def without_transformers(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_transformers)
    message = invoke(monkeypatch, "demo", "--model", str(tmp_path))
    assert message == "tuckaway: this command needs transformers: pip install 'tuckaway[demo]'"
