"""A checkpoint under the names of the model: :func:`renamed`, in steps that each leave the bytes where they are.

1. ``key_mapping``: regular expressions, as transformers names and applies them.
2. ``conversions``: :class:`Merge` and :class:`Split`, where the model has in one tensor what the checkpoint has in
   several, or the reverse.
3. The rules that a library keeps for its models, if the model is one of them (:func:`register_rules`).
4. What wrappers leave in names (``module.`` of DistributedDataParallel, ``_orig_mod.`` of torch.compile), and a prefix
   that all names have on one side only (``model.``): only if more of the model's tensors are found then.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from tuckaway.checkpoint import Checkpoint, TensorEntry
from tuckaway.errors import ConfigError, KeyMismatch
from tuckaway.load.merging import Merge, Split

__all__ = ["register_rules", "renamed"]

_RULES: dict[str, str] = {}
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Pieces that torch's wrappers put into names."""


def register_rules(base_class: str, function: str) -> None:
    """Have ``function(checkpoint, model)`` translate the checkpoints of models that derive from ``base_class``.

    Args:
        base_class: module and name, ``"transformers.modeling_utils.PreTrainedModel"``; it is not imported.
        function: ``"module:name"``, imported when it is needed; returns the checkpoint under the model's names.
    """
    _RULES[base_class] = function


def renamed(
    checkpoint: Checkpoint,
    model: nn.Module,
    wanted: Sequence[Sequence[str]],
    *,
    key_mapping: Mapping[str, str] | None = None,
    conversions: Sequence[Merge | Split] = (),
) -> tuple[Checkpoint, list[str]]:
    """Return the checkpoint under the model's names, and in words what was done to find them.

    Args:
        checkpoint: an open checkpoint.
        model: the model; may be empty.
        wanted: names of each tensor that the model needs.
        key_mapping: regular expressions of names to what replaces them (``{"^transformer[.]": ""}``), in this order.
        conversions: tensors to join or to cut, by names after ``key_mapping``.

    Raises:
        ConfigError: an expression that is none, or that matches nothing.
        KeyMismatch: two tensors get one name.
        MismatchError: a conversion does not fit what the checkpoint has.
    """
    entries, notes = dict(checkpoint.entries), list[str]()
    for pattern, replacement in (key_mapping or {}).items():
        entries = _substituted(entries, pattern, replacement)
    for conversion in conversions:
        entries = conversion.applied(entries)
    if entries != checkpoint.entries:
        checkpoint = dataclasses.replace(checkpoint, entries=entries)
    if not _all_found(wanted, checkpoint.entries):
        for function in _rules_for(model):
            checkpoint = function(checkpoint, model)
    if not _all_found(wanted, checkpoint.entries):
        names = {name for group in wanted for name in group}
        found, note = _without_wrappers(checkpoint.entries, names)
        if note:
            checkpoint = dataclasses.replace(checkpoint, entries=found)
            notes.append(note)
    return checkpoint, notes


def _all_found(wanted: Sequence[Sequence[str]], entries: Mapping[str, TensorEntry]) -> bool:
    return all(any(name in entries for name in group) for group in wanted)


def _substituted(
    entries: Mapping[str, TensorEntry], pattern: str, replacement: str
) -> dict[str, TensorEntry]:
    try:
        changed = {name: re.sub(pattern, replacement, name) for name in entries}
    except re.error as error:
        raise ConfigError(f"{pattern!r} in key_mapping is no regular expression: {error}") from None
    if all(name == new for name, new in changed.items()) and not any(re.search(pattern, n) for n in entries):
        raise ConfigError(f"{pattern!r} in key_mapping matches no tensor of the checkpoint")
    return _under(entries, changed)


def _under(entries: Mapping[str, TensorEntry], names: Mapping[str, str]) -> dict[str, TensorEntry]:
    result: dict[str, TensorEntry] = {}
    origin: dict[str, str] = {}
    for name, entry in entries.items():
        new = names[name]
        if new in result:
            raise KeyMismatch(f"{origin[new]!r} and {name!r} both become {new!r}", where=entry.path.name)
        result[new], origin[new] = entry, name
    return result


def _rules_for(model: nn.Module) -> list[Callable[[Checkpoint, nn.Module], Checkpoint]]:
    found = []
    for kind in type(model).__mro__:
        target = _RULES.get(f"{kind.__module__}.{kind.__qualname__}")
        if target is not None:
            module, _, name = target.partition(":")
            found.append(getattr(importlib.import_module(module), name))
    return found


def _without_wrappers(
    entries: Mapping[str, TensorEntry], wanted: set[str]
) -> tuple[dict[str, TensorEntry], str]:
    """Try the ways that names differ by as a whole; take the one that finds most, if it finds more than before."""
    best: tuple[int, dict[str, str], str] = (len(wanted & entries.keys()), {}, "")
    for names, note in _ways(entries, wanted):
        hits = len(wanted & set(names.values()))
        if hits > best[0] and len(set(names.values())) == len(names):
            best = (hits, names, note)
    if not best[2]:
        return dict(entries), ""
    return _under(entries, best[1]), best[2]


def _ways(entries: Mapping[str, Any], wanted: set[str]) -> Iterable[tuple[dict[str, str], str]]:
    bare = {_bare(name): name for name in wanted}
    if len(bare) == len(wanted):
        yield (
            {name: bare.get(_bare(name), name) for name in entries},
            "names without the pieces that wrappers add (_orig_mod., module.)",
        )
    prefix = _common_prefix(entries)
    if prefix:
        yield {name: name.removeprefix(prefix) for name in entries}, f"names without the prefix {prefix!r}"
    for path in dict.fromkeys(name.partition(".")[0] + "." for name in (*entries, *wanted) if "." in name):
        cut = {name: name.removeprefix(path) for name in entries}
        yield cut, f"names without the prefix {path!r}"
        yield {name: path + name for name in entries}, f"names with the prefix {path!r}"
    missing = _common_prefix(wanted)
    if missing:
        yield {name: missing + name for name in entries}, f"names with the prefix {missing!r}"


def _bare(name: str) -> str:
    """Leave out wrappers' pieces.

    >>> _bare("module.layers.0._orig_mod.weight")
    'layers.0.weight'
    """
    return ".".join(piece for piece in name.split(".") if piece not in _WRAPPERS)


def _common_prefix(names: Iterable[str]) -> str:
    """Return the modules that all names begin with.

    >>> _common_prefix(["a.b.c.weight", "a.b.bias"])
    'a.b.'
    """
    pieces = [name.split(".")[:-1] for name in names]
    common = []
    for column in zip(*pieces, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return "".join(f"{piece}." for piece in common)
