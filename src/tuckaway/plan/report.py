"""What was quantized, what was not and why, and where everything lies: :class:`QuantizationReport`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tuckaway.errors import PlanError
from tuckaway.plan.memory import format_bytes
from tuckaway.plan.text import joined, pattern_of, table
from tuckaway.plan.ties import ancestors
from tuckaway.tensor import TensorSpec

__all__ = ["QuantizationReport", "ReportRow", "quantization_report"]


@dataclass(frozen=True)
class ReportRow:
    """One tensor.

    Args:
        name: its first name.
        format: ``"nf4"``, ``"fp4"``, ``"int8"``, or the dtype of a plain tensor.
        shape: as torch sees it.
        nbytes: exact bytes, scales included.
        reason: why it is not quantized; None when it is.
        device: an accelerator's index, ``"cpu"`` or ``"disk"``; None when no map was given.
        aliases: its other names, when it is tied.
        is_buffer: a buffer, not a parameter.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    reason: str | None
    device: int | str | None = None
    aliases: tuple[str, ...] = ()
    is_buffer: bool = False

    @property
    def quantized(self) -> bool:
        """Whether it is quantized."""
        return self.reason is None


@dataclass(frozen=True)
class QuantizationReport:
    """Every tensor of a model; ``str()`` gives the table, ``rows`` the data.

    Args:
        rows: one a tensor, tied ones once, in the model's order.
        notes: what was done to find the tensors in the checkpoint.
    """

    rows: tuple[ReportRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(row.nbytes for row in self.rows)

    @property
    def quantized(self) -> tuple[ReportRow, ...]:
        """The rows of quantized tensors."""
        return tuple(row for row in self.rows if row.quantized)

    @property
    def unquantized(self) -> tuple[ReportRow, ...]:
        """The rows of parameters that are not quantized, each with its reason."""
        return tuple(row for row in self.rows if not row.quantized and not row.is_buffer)

    def bytes_by_device(self) -> dict[int | str, int]:
        """Return bytes by placement."""
        totals: dict[int | str, int] = defaultdict(int)
        for row in self.rows:
            if row.device is not None:
                totals[row.device] += row.nbytes
        return dict(totals)

    def bytes_by_format(self) -> dict[str, int]:
        """Return bytes by format."""
        totals: dict[str, int] = defaultdict(int)
        for row in self.rows:
            totals[row.format] += row.nbytes
        return dict(totals)

    def reasons(self) -> dict[str, int]:
        """Return how many parameters were left unquantized, by reason, the commonest first."""
        return dict(Counter(row.reason or "" for row in self.unquantized).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it: the rows under ``"tensors"``, and the sums."""
        return {
            "tensors": [asdict(row) | {"quantized": row.quantized} for row in self.rows],
            "bytes": self.nbytes,
            "formats": self.bytes_by_format(),
            "devices": {str(place): size for place, size in self.bytes_by_device().items()},
            "reasons": self.reasons(),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        parts = [table(("tensors", "format", "shape", "bytes", "on", "not quantized because"), self._lines())]
        formats = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.bytes_by_format().items())
        parameters = len(self.quantized) + len(self.unquantized)
        parts.append(f"{len(self.quantized)} of {parameters} parameters quantized; {formats}")
        places = self.bytes_by_device()
        if places:
            parts.append(
                "placed: " + ", ".join(f"{_place(device)} {format_bytes(n)}" for device, n in places.items())
            )
        return "\n".join([*parts, *self.notes])

    def _lines(self) -> list[tuple[str, ...]]:
        """Rows that differ only in a layer's number become one line, ``h.{0-11}.mlp.weight``."""
        groups: dict[tuple[object, ...], list[ReportRow]] = {}
        for row in self.rows:
            key = (pattern_of(row.name), row.format, row.shape, row.reason, row.device)
            groups.setdefault(key, []).append(row)
        return [
            (
                joined([row.name for row in rows]),
                rows[0].format,
                "x".join(map(str, rows[0].shape)) or "scalar",
                format_bytes(sum(row.nbytes for row in rows)),
                "" if rows[0].device is None else _place(rows[0].device),
                rows[0].reason or "",
            )
            for rows in groups.values()
        ]


def quantization_report(
    specs: Mapping[str, TensorSpec],
    reasons: Mapping[str, str],
    device_map: Mapping[str, int | str | torch.device] | None = None,
    *,
    ties: Iterable[Sequence[str]] = (),
    notes: Iterable[str] = (),
) -> QuantizationReport:
    """Make the report of a model.

    Args:
        specs: final form of every tensor, as :func:`~tuckaway.plan.choose_specs` gives them.
        reasons: why tensors are not quantized.
        device_map: where modules and tensors are; the longest name counts.
        ties: groups of names that are one tensor; the first of each in ``specs`` gets the row.
        notes: what else is to be said.

    Raises:
        PlanError: the map leaves a tensor out.
    """
    names_of: dict[str, tuple[str, ...]] = {}
    for group in ties:
        known = tuple(name for name in group if name in specs)
        names_of.update(dict.fromkeys(known, known))
    rows, done = [], set[str]()
    for name, spec in specs.items():
        if name in done:
            continue
        names = names_of.get(name, (name,))
        done.update(names)
        plain = spec.layout is None
        rows.append(
            ReportRow(
                name,
                str(spec.dtype).removeprefix("torch.") if spec.layout is None else spec.layout.format,
                tuple(spec.shape),
                spec.nbytes,
                reasons.get(name, "the checkpoint holds it unquantized") if plain else None,
                None if device_map is None else _fastest(names, device_map),
                tuple(other for other in names if other != name),
                spec.is_buffer,
            )
        )
    return QuantizationReport(tuple(rows), tuple(notes))


def _fastest(names: Sequence[str], device_map: Mapping[str, int | str | torch.device]) -> int | str:
    """Return the place of a tensor; a tied one lies at the fastest of its names' places."""
    found = []
    for name in names:
        entry = next((path for path in ancestors(name) if path in device_map), None)
        if entry is None:
            raise PlanError(f"the device map leaves out {name!r}")
        place = device_map[entry]
        found.append(str(place) if isinstance(place, torch.device) else place)
    return min(found, key=lambda place: {"cpu": 1, "disk": 2}.get(str(place), 0))


def _place(device: int | str) -> str:
    return f"GPU {device}" if isinstance(device, int) else device
