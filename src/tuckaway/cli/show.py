"""How commands show things: tables and headings, drawn in a terminal, plain columns elsewhere, or one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["Screen", "name_runs"]


class Screen:
    """Standard output, as a person or a program reads it.

    Args:
        console: rich's; ``None``: a new one on standard output. Where that is no terminal, tables are plain columns of
            their full width, so that logs and pipes get every word.
        json: show a program's reader :meth:`result` alone; everything else is silent.
    """

    def __init__(self, console: Console | None = None, *, json: bool = False) -> None:
        self.json = json
        self.console = console if console is not None else Console(highlight=False, quiet=json)

    def result(self, value: Mapping[str, Any]) -> None:
        """Print a command's result as JSON, where that was asked for. Sizes are bytes, times seconds."""
        if self.json:
            json.dump(value, sys.stdout, indent=2)
            sys.stdout.write("\n")

    def line(self, text: str = "", style: str = "") -> None:
        """Print one line."""
        self.console.print(Text(text, style=style), soft_wrap=True)

    def piece(self, text: str) -> None:
        """Print text as it comes, without a line's end."""
        self.console.print(Text(text), end="", soft_wrap=True)
        self.console.file.flush()

    def table(
        self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, right: int = -1
    ) -> None:
        """Print a table whose columns from ``right`` on are right-aligned: the last one, left out."""
        right = len(head) - 1 if right < 0 else right
        if self.console.is_terminal:
            table = Table(title=title, title_justify="left", title_style="bold")
            for i, name in enumerate(head):
                table.add_column(name, justify="right" if i >= right else "left", overflow="fold")
            for row in rows:
                table.add_row(*map(Text, row))
            self.console.print(table)
            return
        self.line(title)
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        for row in [head, *rows]:
            cells = [
                cell.rjust(width) if i >= right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            self.line("  " + "  ".join(cells).rstrip())


def name_runs(names: Sequence[str]) -> str:
    """Return names with runs of numbered neighbours drawn together.

    >>> name_runs(["embed", "layers.0", "layers.1", "layers.2", "layers.7", "norm"])
    'embed, layers.0-2, layers.7, norm'
    """
    runs: list[tuple[str, int | None, int | None]] = []
    for name in names:
        stem, _, last = name.rpartition(".")
        number = int(last) if last.isdigit() else None
        if runs and number is not None and runs[-1][0] == stem and runs[-1][2] == number - 1:
            runs[-1] = (stem, runs[-1][1], number)
        else:
            runs.append((stem, number, number) if number is not None else (name, None, None))
    return ", ".join(_run(*run) for run in runs)


def _run(stem: str, first: int | None, last: int | None) -> str:
    if first is None:
        return stem
    numbers = str(first) if first == last else f"{first}-{last}"
    return f"{stem}.{numbers}" if stem else numbers
