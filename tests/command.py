"""Run the command line in the process of a test."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tuckaway.cli.main import main


def invoke(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """Run the command with these arguments and return what it exits with: a status, or an error's message."""
    monkeypatch.setattr(sys, "argv", ["tuckaway", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code
