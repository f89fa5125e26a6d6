"""The reference has every public name, and none that is not."""

from __future__ import annotations

import re
from pathlib import Path

import tuckaway
from tuckaway import errors

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
LAZY = {"TuckawayConfig"}
"""Public names that ``from tuckaway import *`` leaves out, because they import transformers."""


def test_every_public_name_is_there_once() -> None:
    named = re.findall(
        r"^\.\. auto\w+:: tuckaway\.(\w+)$", (REFERENCE / "api.md").read_text("utf-8"), re.MULTILINE
    )
    assert sorted(named) == sorted((set(tuckaway.__all__) - set(errors.__all__)) | LAZY)


def test_errors_are_documented_whole() -> None:
    text = (REFERENCE / "errors.md").read_text("utf-8")
    assert "automodule:: tuckaway.errors" in text
    assert ":members:" in text
