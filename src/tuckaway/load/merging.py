"""Tensors that are one in a model and several in its checkpoint, or the reverse: :class:`Merge` and :class:`Split`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tuckaway.checkpoint import TensorEntry
from tuckaway.checkpoint.entry import JoinedEntry, ResidentEntry
from tuckaway.checkpoint.reader import read_tensor
from tuckaway.errors import ConfigError, MismatchError

__all__ = ["ComputedEntry", "Merge", "Split", "joined"]

_ANY, _NUMBER = "*", "#"
_SHORT = 4096
"""Bytes of the shortest run that is read by itself: a GB in shorter ones is a million calls and tuples."""


class ComputedEntry(ResidentEntry):
    """A tensor of no file: made of others whenever it is read, and not kept.

    Args:
        name: its name.
        like: shape and dtype of it, on the meta device.
        path: file of one of the others, for messages.
        make: reads the others and makes it.
    """

    __slots__ = ("_make",)

    def __init__(self, name: str, like: torch.Tensor, path: Path, make: Callable[[], torch.Tensor]) -> None:
        fields = {"name": name, "dtype": like.dtype, "shape": tuple(like.shape), "path": path, "offset": 0}
        fields |= {"nbytes": like.numel() * like.itemsize, "identity": None, "crc32": None, "_make": make}
        for field, value in fields.items():
            object.__setattr__(self, field, value)

    @property
    def data(self) -> torch.Tensor:
        """The tensor, made anew."""
        return self._make().contiguous()  # type: ignore[attr-defined, no-any-return]


@dataclass(frozen=True)
class Merge:
    """Several tensors of the checkpoint that are one tensor of the model.

    In the names ``*`` stands for any text, the same in all of them, and ``#`` for a number: the tensors of all numbers
    are stacked, in their order, along a new first dimension, before the sources are joined.

    Args:
        target: name in the model.
        sources: names in the checkpoint, in the order they are joined.
        dim: dimension to join along.
        transpose: swap the last two dimensions of each source first.

    Example:
        >>> qkv = Merge("*.c_attn.weight", ["*.q.weight", "*.k.weight", "*.v.weight"])
        >>> experts = Merge("*.experts.gate_up_proj", ["*.experts.#.w1.weight", "*.experts.#.w3.weight"], dim=1)
    """

    target: str
    sources: Sequence[str]
    dim: int = 0
    transpose: bool = False

    def applied(self, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
        """Return the tensors with the merged ones in the place of their sources.

        Raises:
            ConfigError: the sources match nothing.
            MismatchError: sources are missing, or do not fit together.
        """
        groups: dict[str, list[dict[int, TensorEntry]]] = {}
        for index, source in enumerate(self.sources):
            for text, number, name in _matching(source, entries):
                parts = groups.setdefault(text, [{} for _ in self.sources])
                parts[index][number] = entries[name]
        if not groups:
            raise ConfigError(f"{list(self.sources)} match no tensors of the checkpoint", where=self.target)
        result = dict(entries)
        for text, parts in groups.items():
            name = self.target.replace(_ANY, text, 1)
            result[name] = self._joined(name, parts)
            for entry in (entry for part in parts for entry in part.values()):
                result.pop(next(key for key in _names_of(entries, entry)), None)
        return result

    def _joined(self, name: str, parts: list[dict[int, TensorEntry]]) -> TensorEntry:
        counts = {tuple(sorted(part)) for part in parts}
        numbers = next(iter(counts))
        if len(counts) > 1 or (numbers[0] >= 0 and numbers != tuple(range(len(numbers)))):
            missing = [s for s, part in zip(self.sources, parts, strict=True) if not part] or "some numbers"
            raise MismatchError(f"{name!r} cannot be merged: the checkpoint lacks {missing}")

        def make(read: Callable[[TensorEntry], torch.Tensor]) -> torch.Tensor:
            joined = []
            for part in parts:
                tensors = [read(part[number]) for number in sorted(part)]
                tensors = [t.transpose(-2, -1) for t in tensors] if self.transpose else tensors
                joined.append(torch.stack(tensors) if numbers[0] >= 0 else tensors[0])
            return torch.cat(joined, self.dim) if len(joined) > 1 else joined[0]

        computed = _computed(name, make, parts[0][numbers[0]].path)
        sources = [[part[number] for number in sorted(part)] for part in parts]
        in_runs = None if self.transpose else joined(computed, sources, self.dim, stacked=numbers[0] >= 0)
        return in_runs or computed


def joined(
    like: TensorEntry, sources: Sequence[Sequence[TensorEntry]], dim: int, *, stacked: bool
) -> JoinedEntry | None:
    """Return a tensor that is read run by run out of those that it is joined of; None where that makes no sense.

    Args:
        like: name, dtype and shape of it.
        sources: the tensors of each part; one, or as many as are stacked.
        dim: dimension that the parts are joined along.
        stacked: the tensors of a part are stacked along a new first dimension.
    """
    flat = [entry for part in sources for entry in part]
    if any(type(entry) is not TensorEntry or entry.dtype != like.dtype for entry in flat):
        return None
    dim %= max(len(like.shape), 1)
    if stacked and dim == 0:
        runs = [(entry, 0, entry.numel) for entry in flat]
    else:
        # what lies before the dimension is gone through once, with a run of each part at each step
        outer = math.prod(like.shape[:dim])
        inside = outer // like.shape[0] if stacked and like.shape[0] else outer
        runs = [
            (entry, step % inside * length, length)
            for step in range(outer)
            for part in sources
            for entry in [part[step // inside] if stacked else part[0]]
            for length in [entry.numel // inside]
        ]
    if any(length * like.dtype.itemsize < _SHORT for _, _, length in runs):
        return None
    first = flat[0]
    return JoinedEntry(
        like.name, like.dtype, like.shape, first.path, first.offset, like.nbytes, runs=tuple(runs)
    )


@dataclass(frozen=True)
class Split:
    """One tensor of the checkpoint that is several tensors of the model.

    Args:
        source: name in the checkpoint; ``*`` stands for any text.
        targets: names in the model, in the order they lie in the source, with the same ``*``.
        dim: dimension to cut along.
        sizes: lengths of the parts; ``None``: equal ones.

    Example:
        >>> qkv = Split("*.c_attn.weight", ["*.q.weight", "*.k.weight", "*.v.weight"], sizes=[64, 16, 16])
    """

    source: str
    targets: Sequence[str]
    dim: int = 0
    sizes: Sequence[int] | None = None

    def applied(self, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
        """Return the tensors with the parts in the place of their source.

        Raises:
            ConfigError: the source matches nothing.
            MismatchError: a source cannot be cut like this.
        """
        result, found = dict(entries), False
        for text, _, name in _matching(self.source, entries):
            found = True
            entry = result.pop(name)
            for index, target in enumerate(self.targets):
                own = target.replace(_ANY, text, 1)
                result[own] = self._part(own, entry, index)
        if not found:
            raise ConfigError(
                f"{self.source!r} matches no tensor of the checkpoint", where=list(self.targets)
            )
        return result

    def _part(self, name: str, entry: TensorEntry, index: int) -> TensorEntry:
        length, count = entry.shape[self.dim] if entry.shape else 0, len(self.targets)
        sizes = list(self.sizes) if self.sizes is not None else [length // count] * count
        if sum(sizes) != length or len(sizes) != count:
            raise MismatchError(
                f"{entry.name!r} {list(entry.shape)} cannot be cut into {count} parts of {sizes}",
                where=entry.path.name,
            )
        start, size = sum(sizes[:index]), sizes[index]
        if self.dim == 0 and type(entry) is TensorEntry:
            # rows that lie in a row: a tensor of its own, without reading the others
            row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
            return dataclasses.replace(
                entry,
                name=name,
                shape=(size, *entry.shape[1:]),
                offset=entry.offset + start * row,
                nbytes=size * row,
                crc32=None,
            )
        return _computed(name, lambda read: read(entry).narrow(self.dim, start, size), entry.path)


def _computed(
    name: str, make: Callable[[Callable[[TensorEntry], torch.Tensor]], torch.Tensor], path: Path
) -> ComputedEntry:
    try:
        like = make(lambda entry: torch.empty(entry.shape, dtype=entry.dtype, device="meta"))
    except (RuntimeError, IndexError) as error:
        raise MismatchError(f"{name!r} cannot be made: {error}", where=path.name) from error
    return ComputedEntry(name, like, path, lambda: make(read_tensor))


def _names_of(entries: Mapping[str, TensorEntry], entry: TensorEntry) -> Iterator[str]:
    return (name for name, other in entries.items() if other is entry)


def _matching(template: str, entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, int, str]]:
    """Yield what ``*`` and ``#`` stand for, and the name, for all names that fit; -1 without a number."""
    pattern = re.escape(template).replace(re.escape(_ANY), "(?P<any>.*)", 1)
    pattern = pattern.replace(re.escape(_NUMBER), r"(?P<number>\d+)", 1)
    for name in entries:
        match = re.fullmatch(pattern, name)
        if match is not None:
            found = match.groupdict()
            yield found.get("any") or "", int(found.get("number") or -1), name
