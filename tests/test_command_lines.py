"""Every ``tuckaway ...`` that the README and the docs show names a command and options that exist."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuckaway.cli.app import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "docs").rglob("*.ipynb")),
]
GLOBAL = {"--help", "--version", "--verbose", "--install-completion", "--show-completion"}
_SHELL = re.compile(r"^```(?:sh|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shown() -> Iterator[tuple[str, list[str]]]:
    """Yield the page and the words of every command line."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if page.suffix == ".ipynb":
            cells = ("".join(cell["source"]) for cell in json.loads(text)["cells"])
            lines = [
                line.removeprefix("!") for cell in cells for line in cell.splitlines() if line.startswith("!")
            ]
        else:
            lines = [line for block in _SHELL.findall(text) for line in block.splitlines()]
            lines += re.findall(r"`(tuckaway [^`]+)`", text)
        for line in lines:
            words = shlex.split(line, comments=True)
            if "tuckaway" in words:
                yield f"{page.relative_to(ROOT)}: {line}", words[words.index("tuckaway") + 1 :]


def options(command: str) -> set[str]:
    """Return the options of a command, as they are typed."""
    function, found = COMMANDS[command], {"--help"}
    hints = typing.get_type_hints(function, include_extras=True)
    for name in inspect.signature(function).parameters:
        info = typing.get_args(hints[name])[1]
        given = [text for text in (info.default, *(info.param_decls or ())) if str(text).startswith("-")]
        found.update(
            part for text in given or [f"--{name.replace('_', '-')}"] for part in str(text).split("/")
        )
    return found


@pytest.mark.parametrize(("where", "words"), [pytest.param(*one, id=one[0]) for one in dict(shown()).items()])
def test_command_line_is_one(where: str, words: list[str]) -> None:
    if not words or words[0] in GLOBAL:
        return
    assert words[0] in COMMANDS or words[0].isupper(), where
    if words[0] in COMMANDS:
        named = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
        assert named <= options(words[0]), where
