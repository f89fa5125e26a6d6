from __future__ import annotations

import io

import pytest
from rich.console import Console

from tuckaway.cli.show import Screen, name_runs


def printed(*, terminal: bool, width: int = 60) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, highlight=False, legacy_windows=False)
    return Screen(console), out


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([], ""),
        (["lm_head"], "lm_head"),
        (["0"], "0"),
        (["0", "1", "2"], "0-2"),
        (["h.0", "h.1", "h.3", "h.4"], "h.0-1, h.3-4"),
        (["a.0", "b.1"], "a.0, b.1"),
        (["h.1", "h.0"], "h.1, h.0"),
        (["", "x"], ", x"),
    ],
)
def test_runs_of_numbers_are_drawn_together(names: list[str], shown: str) -> None:
    assert name_runs(names) == shown


def test_table_in_a_pipe_is_plain_columns_of_full_width() -> None:
    screen, out = printed(terminal=False, width=20)
    screen.table("Title", ("what", "size"), [("a long name " * 4, "1 MB"), ("b", "22 MB")])
    assert out.getvalue().splitlines() == [
        "Title",
        "  " + "what".ljust(48) + "   size",
        "  " + "a long name " * 4 + "   1 MB",
        "  " + "b".ljust(48) + "  22 MB",
    ]


def test_table_in_a_terminal_is_drawn_and_loses_no_word() -> None:
    screen, out = printed(terminal=True, width=30)
    screen.table("Title", ("what", "size"), [("[brackets] " * 6, "1 MB")])
    assert out.getvalue().count("[brackets]") == 6
    assert "│" in out.getvalue()


def test_pieces_come_one_after_the_other() -> None:
    screen, out = printed(terminal=False)
    for piece in ("The ", "[b]sky[/b]", "\nis blue."):
        screen.piece(piece)
    assert out.getvalue() == "The [b]sky[/b]\nis blue."
