"""Plain text for people: tables, and names that differ in a number drawn together."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["filled", "joined", "pattern_of", "table"]


def pattern_of(name: str) -> str:
    """Return a dotted name with ``*`` for its numbers: names of one pattern can be :func:`joined`.

    >>> pattern_of("h.3.mlp.weight")
    'h.*.mlp.weight'
    """
    return ".".join("*" if piece.isdigit() else piece for piece in name.split("."))


def joined(names: Sequence[str]) -> str:
    """Write names of one pattern as one.

    >>> joined(["h.0.w", "h.1.w", "h.3.w"])
    'h.{0-1,3}.w'
    """
    pieces = [name.split(".") for name in names]
    columns = []
    for column in zip(*pieces, strict=True):
        distinct = sorted(set(column), key=lambda piece: (len(piece), piece))
        columns.append(
            column[0] if len(distinct) == 1 else f"{{{_ranges([int(piece) for piece in distinct])}}}"
        )
    return ".".join(columns)


def filled(
    head: Sequence[str], lines: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Leave out the columns that are empty in every line, but for the first.

    >>> filled(("device", "slots", "free"), [("GPU 0", "", "1 kB"), ("disk", "", "")])
    (('device', 'free'), [('GPU 0', '1 kB'), ('disk', '')])
    """
    kept = [i for i in range(len(head)) if i == 0 or any(line[i] for line in lines)]
    return tuple(head[i] for i in kept), [tuple(line[i] for i in kept) for line in lines]


def table(head: Sequence[str], lines: Sequence[Sequence[str]], *, right: int | None = None) -> str:
    """Return columns of text under ruled headings.

    Args:
        head: headings.
        lines: cells.
        right: columns from this one on are right-aligned; ``None``: none is.
    """
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    ruled = [head, tuple("-" * width for width in widths), *lines]
    start = len(head) if right is None else right
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < start else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in ruled
    )


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
