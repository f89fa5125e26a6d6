from __future__ import annotations

import io
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

from tuckaway.checkpoint import Checkpoint, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def errors_to(monkeypatch):
    """Return a function that puts a stream in the place of standard error; pytest puts its own there for each phase."""
    monkeypatch.delenv("TUCKAWAY_NO_PROGRESS", raising=False)

    def errors_to(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return errors_to


def test_a_bar_shows_bytes_and_the_tensor_at_hand(errors_to):
    terminal = errors_to(Terminal())
    threads = threading.active_count()
    with Progress(2048, "Loading") as progress:
        progress.update(1024, "model.layers.0.weight")
        progress.update(1024, "x" * 100 + "the.end")
    assert "Loading: 100%" in terminal.getvalue()
    assert "2.00k/2.00k" in terminal.getvalue()
    assert "the.end" in terminal.getvalue()
    assert "x" * 41 not in terminal.getvalue()
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("value", "silent"), [("1", True), ("true", True), ("0", False), ("", False), ("False", False)]
)
def test_the_environment_silences_it(errors_to, monkeypatch, value, silent):
    terminal = errors_to(Terminal())
    monkeypatch.setenv("TUCKAWAY_NO_PROGRESS", value)
    with Progress(10, "Loading", show=True) as progress:
        progress.update(10, "w")
    assert (terminal.getvalue() == "") == silent


def test_it_is_silent_when_asked_and_where_there_is_no_terminal(errors_to):
    terminal = errors_to(Terminal())
    with Progress(10, "Loading", show=False) as progress:
        progress.update(10, "w")
    assert terminal.getvalue() == ""
    for stream in (io.StringIO(), None):
        errors_to(stream)
        with Progress(10, "Loading") as progress:
            progress.update(10, "w")
        assert stream is None or stream.getvalue() == ""


def test_a_stream_shows_its_bytes(errors_to, tmp_path):
    terminal = errors_to(Terminal())
    save_file({"w": torch.zeros(1024, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    list(Checkpoint.open(tmp_path).stream(piece_bytes=100, progress=None))
    assert "1.00k/1.00k" in terminal.getvalue()
    assert ", w]" in terminal.getvalue()
