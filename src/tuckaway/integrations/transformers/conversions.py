"""transformers' own conversions of checkpoints, for tuckaway's loader: :func:`converted`.

A transformers model may name, split or fuse its weights otherwise than its checkpoints do: experts lie one by one on
the Hub and are one stack in the model, old checkpoints have old names. transformers keeps the rules in a table
(``transformers.conversion_mapping``). Here they are applied to the names in a checkpoint: a renamed tensor is the same
bytes under another name, a converted one is computed when the loader comes to read it, one at a time.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tuckaway.checkpoint import Checkpoint, TensorEntry
from tuckaway.checkpoint.entry import ResidentEntry
from tuckaway.checkpoint.reader import read_tensor
from tuckaway.errors import MismatchError
from tuckaway.integrations.transformers.computed import never_saved
from tuckaway.load.merging import joined

__all__ = ["converted", "in_model_names"]

_BESIDE_CODES = (
    ".absmax",
    ".nested_absmax",
    ".quant_map",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
)
_BESIDE_ROWS = (".SCB", ".weight_format")


def converted(
    checkpoint: Checkpoint, model: Any, key_mapping: Mapping[str, str] | None = None
) -> tuple[Checkpoint, list[Any]]:
    """Return the checkpoint with the names and shapes that ``model`` has, and the rules that were used.

    Args:
        checkpoint: an open checkpoint.
        model: a transformers model; may be empty.
        key_mapping: regular expressions of names in the checkpoint to what replaces them, before all else.

    Raises:
        MismatchError: a rule that cannot be applied to what the checkpoint has.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import dot_natural_key

    rules = get_model_conversion_mapping(model, dict(key_mapping) if key_mapping else None, None)
    names = _Names(model, rules)
    entries: dict[str, TensorEntry] = {}
    groups: dict[str, _Group] = {}
    quantized = {name for name in checkpoint.entries if _companions(name, checkpoint.entries)}
    owners = {key: name for name in quantized for key in _companions(name, checkpoint.entries)}
    for key in sorted(checkpoint.entries, key=dot_natural_key):
        entry, owner = checkpoint.entries[key], owners.get(key)
        name, pattern = names.in_model(owner or key)
        if owner is not None:
            entries[_beside(key, owner, name)] = entry
        elif pattern is None or name not in names.state or key in quantized:
            entries[name] = entry
        else:
            group = groups.setdefault(name, _Group(name, names.converter(pattern)))
            group.add(pattern, entry)
    for group in groups.values():
        for name, computed in group.computed(model).items():
            entries[name] = computed
    entries |= never_saved(model, entries, checkpoint.files[0])
    used = [rule for rule in rules if not hasattr(rule, "was_used") or rule.was_used()]
    return dataclasses.replace(checkpoint, entries=entries), used


def in_model_names(checkpoint: Checkpoint, model: Any) -> Checkpoint:
    """Return the checkpoint with the names and shapes that ``model`` has: what the loader asks for."""
    return converted(checkpoint, model)[0]


class _Names:
    """How names in a checkpoint become names of the model."""

    def __init__(self, model: Any, rules: list[Any]) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.state: dict[str, Any] = model.state_dict()
        self.prefix = model.base_model_prefix
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def in_model(self, key: str) -> tuple[str, str | None]:
        """Return a name in the model, and the pattern of the converter that took the key, if one did."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.state)
        if name not in self.state and pattern is None:
            plain, _ = rename_source_key(key, [], [], self.prefix, self.state)
            if plain in self.state:
                return plain, None
        return name, pattern

    def converter(self, pattern: str) -> Any:
        """Return a converter of one's own for the tensors that ``pattern`` takes."""
        return copy.deepcopy(next(c for c in self.converters if pattern in c.source_patterns))


class _Group:
    """The tensors of a checkpoint that make one or more tensors of the model."""

    def __init__(self, name: str, converter: Any) -> None:
        self.name = name
        self.converter = converter
        self.sources: list[tuple[str, TensorEntry]] = []
        self._lock = threading.Lock()
        self._waiting: dict[str, torch.Tensor] = {}

    def add(self, pattern: str, entry: TensorEntry) -> None:
        """Take one more; transformers stacks them in this order."""
        self.sources.append((pattern, entry))

    def computed(self, model: Any) -> dict[str, TensorEntry]:
        """Return what is made of them, by name in the model: shapes are known, values not yet."""
        try:
            shapes = self._convert(
                model, {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for _, e in self.sources}
            )
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            names = ", ".join(repr(entry.name) for _, entry in self.sources[:3])
            raise MismatchError(
                f"{self.name!r} cannot be made of the checkpoint's {len(self.sources)} tensors {names}...: {error}",
                where=self.sources[0][1].path.name,
                hint="build the model with the checkpoint's configuration",
            ) from error
        found: dict[str, TensorEntry] = {
            name: ComputedEntry(name, tensor, self.sources[0][1], self, model)
            for name, tensor in shapes.items()
        }
        if len(found) == 1:
            ((name, entry),) = found.items()
            found[name] = self._in_runs(entry) or entry
        return found

    def _in_runs(self, like: TensorEntry) -> TensorEntry | None:
        """Return a stack of experts that is read out of them piece by piece; None if it is made otherwise."""
        operations = list(self.converter.operations)
        kinds = [type(operation).__name__ for operation in operations]
        if kinds not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) or operations[0].dim != 0:
            return None
        parts = [
            [entry for own, entry in self.sources if own == pattern]
            for pattern in self.converter.source_patterns
        ]
        if not parts[0] or len({len(part) for part in parts}) > 1:
            return None
        return joined(like, parts, operations[-1].dim, stacked=True)

    def make(self, name: str, model: Any) -> torch.Tensor:
        """Read the sources and return one of the tensors made of them; its siblings wait until they are asked for."""
        with self._lock:
            if name not in self._waiting:
                self._waiting = self._convert(
                    model, {entry.name: read_tensor(entry) for _, entry in self.sources}
                )
            return self._waiting.pop(name)

    def _convert(self, model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(self.converter)
        for pattern, entry in self.sources:
            converter.add_tensor(self.name, entry.name, pattern, tensors[entry.name])
        result = converter.convert(self.name, model=model, config=model.config)
        if isinstance(result, tuple):  # transformers 5.0 returns errors as well
            result = result[0]
        return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}


class ComputedEntry(ResidentEntry):
    """A tensor of no file: made of others when it is read, and not kept."""

    __slots__ = ("_group", "_model")

    def __init__(self, name: str, like: torch.Tensor, first: TensorEntry, group: _Group, model: Any) -> None:
        fields = {
            "name": name,
            "dtype": like.dtype,
            "shape": tuple(like.shape),
            "path": first.path,
            "offset": first.offset,
            "nbytes": like.nbytes,
            "identity": None,
            "crc32": None,
            "_group": group,
            "_model": model,
        }
        for field, value in fields.items():
            object.__setattr__(self, field, value)

    @property
    def data(self) -> torch.Tensor:
        """The tensor, made anew."""
        return self._group.make(self.name, self._model).contiguous()  # type: ignore[attr-defined, no-any-return]


def _companions(name: str, entries: Iterable[str]) -> list[str]:
    """Names of the tensors that stand beside the codes ``name``; none if that is a plain tensor."""
    beside = name.removesuffix(".weight")
    candidates = [name + end for end in _BESIDE_CODES] + [beside + end for end in _BESIDE_ROWS]
    return [key for key in candidates if key in entries]


def _beside(key: str, owner: str, name: str) -> str:
    """Return the name beside ``name`` of what stands beside ``owner``."""
    if key.startswith(owner):
        return name + key[len(owner) :]
    return name.removesuffix(".weight") + key[len(owner.removesuffix(".weight")) :]
