"""Which tensors of a checkpoint make which tensor of the model, checked before anything is changed.

Every parameter and persistent buffer of the model gets a :class:`Feed`. What the checkpoint already holds quantized
keeps its format: its bytes go to their places.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from tuckaway.checkpoint import Checkpoint, TensorEntry
from tuckaway.config import QuantizationConfig, as_dtype
from tuckaway.errors import DTypeMismatch, KeyMismatch, ShapeMismatch, nearest_names
from tuckaway.formats import Components, Serialized, registered_formats
from tuckaway.load.scaled import SCALE, scales_of
from tuckaway.tensor import QuantizedTensor, TensorSpec

__all__ = ["Feed", "Match", "distinct", "find_source", "match_checkpoint", "match_model"]

_LISTED = 20
"""Names an error lists in full; the count of the rest follows."""


@dataclass(frozen=True)
class Feed:
    """What fills one tensor of the model.

    Args:
        names: the tensor's names in the model; more than one when it is tied.
        spec: its final form.
        entries: component to the checkpoint's tensor; the key ``""`` for a tensor that is cast or quantized, beside it
            :data:`~tuckaway.load.scaled.SCALE` where its 8-bit floats have scales.
        values: components known without reading.
        copies: what the checkpoint holds under the tensor's other names, in the same form; must be equal.
    """

    names: tuple[str, ...]
    spec: TensorSpec
    entries: dict[str, TensorEntry]
    values: Components
    copies: tuple[dict[str, TensorEntry], ...] = ()

    @property
    def quantized_already(self) -> bool:
        """The checkpoint holds it in its final format."""
        return "" not in self.entries


@dataclass(frozen=True)
class Match:
    """A model and a checkpoint that belong together.

    Args:
        feeds: one for every tensor that the checkpoint fills.
        kept: names of buffers (and, when allowed, parameters) that keep the value they have in the model.
        unexpected: tensors of the checkpoint that the model has no place for.
        extra: what the checkpoint has of modules' ``_extra_state``, by name.
    """

    feeds: tuple[Feed, ...]
    kept: tuple[str, ...]
    unexpected: tuple[str, ...]
    extra: Mapping[str, TensorEntry | None] = field(default_factory=dict)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Final form of every tensor by each of its names."""
        return {name: feed.spec for feed in self.feeds for name in feed.names}


def match_checkpoint(
    checkpoint: Checkpoint,
    specs: Mapping[str, TensorSpec],
    groups: Sequence[Sequence[str]],
    config: QuantizationConfig | None,
    *,
    real: Iterable[str],
    ignored: Sequence[str] = (),
    extra: Mapping[str, TensorEntry | None] | None = None,
    strict: bool = True,
) -> Match:
    """Find the source of every tensor of a model.

    Args:
        checkpoint: an open checkpoint.
        specs: wanted form of every parameter and buffer, by name; tied ones under each name.
        groups: names that are one tensor; a name in no group stands alone.
        config: its dtypes apply to tensors that are quantized already.
        real: names of tensors that hold a value already (are not on the meta device).
        ignored: regular expressions of names in the checkpoint that may be left over.
        extra: states that modules keep beside tensors, by name; None for those that the checkpoint lacks.
        strict: refuse checkpoints with other tensors left over.

    Raises:
        KeyMismatch: the checkpoint lacks a tensor, or (``strict``) has one too many.
        ShapeMismatch: a tensor of another shape.
        DTypeMismatch: integers for floats, or the reverse.
        CheckpointError: quantized tensors whose parts do not fit together.
    """
    real, consumed = set(real), set[str]()
    feeds: list[Feed] = []
    kept: list[str] = []
    missing: list[str] = []
    for names in distinct(specs, groups):
        spec = specs[names[0]]
        feed = None
        for name in names:
            found = find_source(checkpoint, name, specs[name], config)
            if found is None:
                continue
            entries, values, final, used = found
            consumed |= used
            if feed is None:
                feed = Feed(names, final, entries, values)
            elif entries.keys() == feed.entries.keys():
                feed = replace(feed, copies=(*feed.copies, entries))
        if feed is not None:
            feeds.append(feed)
        elif not spec.persistent or (names[0] in real and (spec.is_buffer or not strict)):
            kept.extend(names)
        else:
            missing.append(names[0])
    extra = extra or {}
    if strict:
        missing.extend(name for name, entry in extra.items() if entry is None)
    left = [n for n in checkpoint.entries if n not in consumed and n not in extra]
    not_persistent = {n for n, s in specs.items() if not s.persistent}
    unexpected = [n for n in left if n not in not_persistent and not any(re.search(p, n) for p in ignored)]
    if missing or (strict and unexpected):
        raise KeyMismatch(*_describe(missing, unexpected if strict else [], checkpoint))
    return Match(tuple(feeds), tuple(kept), tuple(unexpected), extra)


def match_model(
    specs: Mapping[str, TensorSpec], groups: Sequence[Sequence[str]], state: Mapping[str, torch.Tensor]
) -> Match:
    """Feed a model from its own, real tensors: what is to be quantized; all else is kept and only moved."""
    feeds: list[Feed] = []
    kept: list[str] = []
    for names in distinct(specs, groups):
        spec = specs[names[0]]
        if spec.layout is None or isinstance(state[names[0]], QuantizedTensor):
            kept.extend(names)
        else:
            feeds.append(Feed(names, spec, {}, {}))
    return Match(tuple(feeds), tuple(kept), ())


def distinct(specs: Mapping[str, TensorSpec], groups: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Return the names of each tensor, once."""
    group_of = {name: tuple(group) for group in groups for name in group}
    seen: set[str] = set()
    result = []
    for name in specs:
        if name not in seen:
            names = group_of.get(name, (name,))
            seen.update(names)
            result.append(names)
    return result


_Found = tuple[dict[str, TensorEntry], Components, TensorSpec, set[str]]


def find_source(
    checkpoint: Checkpoint, name: str, spec: TensorSpec, config: QuantizationConfig | None
) -> _Found | None:
    """Find what fills one tensor of the model: entries and values by component, its final form, names it takes.

    Raises:
        ShapeMismatch: a tensor of another shape.
        DTypeMismatch: integers for floats, or the reverse.
        CheckpointError: quantized tensors whose parts do not fit together.
    """
    for format in registered_formats().values():
        serialized = format.find(name, checkpoint.entries, checkpoint.read)
        if serialized is not None:
            return _quantized_already(checkpoint, name, spec, serialized, config)
    entry = checkpoint.entries.get(name)
    if entry is None:
        return None
    if tuple(entry.shape) != tuple(spec.shape):
        raise ShapeMismatch(
            f"{name!r} is {list(entry.shape)} in the checkpoint and {list(spec.shape)} in the model",
            where=entry.path.name,
            hint="build the model with the checkpoint's configuration",
        )
    if entry.dtype.is_floating_point != spec.dtype.is_floating_point:
        raise DTypeMismatch(
            f"{name!r} is {entry.dtype} in the checkpoint and {spec.dtype} in the model",
            where=entry.path.name,
        )
    if entry.dtype.is_floating_point and entry.dtype.itemsize == 1 < spec.dtype.itemsize:
        scale, used = scales_of(name, checkpoint.entries)
        if scale is not None:
            return {"": entry, SCALE: checkpoint.entries[scale]}, {}, spec, {name} | used
    return {"": entry}, {}, spec, {name}


def _quantized_already(
    checkpoint: Checkpoint, name: str, spec: TensorSpec, found: Serialized, config: QuantizationConfig | None
) -> _Found:
    layout = found.layout
    swapped = (*layout.shape[:-2], *reversed(layout.shape[-2:]))
    asked = spec.layout is not None and spec.layout.transposed
    transposed = asked if swapped == layout.shape else layout.shape != spec.shape
    if (swapped if transposed else layout.shape) != spec.shape:
        raise ShapeMismatch(
            f"{name!r} is {list(layout.shape)} in the checkpoint and {list(spec.shape)} in the model",
            where=checkpoint.entries[name].path.name,
            hint="build the model with the checkpoint's configuration",
        )
    outer = (config.plain_dtype if config is not None else None) or layout.dtype
    final = replace(
        layout,
        transposed=transposed,
        compute_dtype=None if config is None else as_dtype(config.compute_dtype, "compute_dtype"),
        int8_threshold=(6.0 if config is None else config.int8_threshold)
        if layout.format == "int8"
        else None,
    )
    entries = {component: checkpoint.entries[source] for component, source in found.sources.items()}
    return entries, found.values, replace(spec, dtype=outer, layout=final), set(found.consumed)


def _describe(missing: list[str], unexpected: list[str], checkpoint: Checkpoint) -> tuple[str]:
    parts = []
    if missing:
        parts.append(f"the checkpoint lacks {_names(missing)}")
        near = nearest_names(missing[0], unexpected or checkpoint.entries)
        if near:
            parts.append(f"for {missing[0]!r}, {near}")
    if unexpected:
        parts.append(f"the model has no place for {_names(unexpected)} (strict=False leaves them out)")
    where = ", ".join(path.name for path in checkpoint.files[:3]) + (
        ", ..." if len(checkpoint.files) > 3 else ""
    )
    return (f"{'; '.join(parts)} ({where})",)


def _names(names: list[str]) -> str:
    shown = ", ".join(repr(n) for n in names[:_LISTED])
    more = len(names) - _LISTED
    return f"{len(names)} tensor{'s' * (len(names) > 1)}: {shown}" + (f" and {more} more" if more > 0 else "")
