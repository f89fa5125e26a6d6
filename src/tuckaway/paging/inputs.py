"""Move what a forward is given, or gives, to a device: nested containers of tensors."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

__all__ = ["first_device", "move", "wants_grad"]


_LEAVES = frozenset({type(None), bool, int, float, str})


def move(value: Any, device: torch.device, skip: Collection[str] = ()) -> Any:
    """Return ``value`` with its tensors on ``device``.

    Containers in which nothing moves are returned as they are, so that what a module writes into one (a cache, a
    list of states) reaches its owner.

    Args:
        value: a tensor, or tuples, lists, mappings and dataclasses of such; anything else is left alone.
        device: with its index.
        skip: keys of mappings that are left alone.
    """
    if type(value) in _LEAVES:  # most keyword arguments: asked first, as every layer is called with some
        return value
    if isinstance(value, torch.Tensor):
        if value.device == device:
            return value
        # out of pageable memory the driver takes the bytes before it returns; pinned memory its owner may overwrite
        at_once = device.type == "cpu" or (value.device.type == "cpu" and value.is_pinned())
        return value.to(device, non_blocking=not at_once)
    if isinstance(value, tuple | list):
        moved = [move(item, device, skip) for item in value]
        if all(map(operator.is_, moved, value)):
            return value
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    if isinstance(value, (dict, Mapping)):
        changed = {
            key: new
            for key, item in value.items()
            if key not in skip and (new := move(item, device, skip)) is not item
        }
        if not changed:
            return value
        fresh: Any = copy.copy(value)
        for key, new in changed.items():
            fresh[key] = new
        return fresh
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        new_fields = {name: move(item, device, skip) for name, item in fields.items() if name not in skip}
        if all(new is fields[name] for name, new in new_fields.items()):
            return value
        return dataclasses.replace(value, **new_fields)
    return value


def first_device(value: Any) -> torch.device | None:
    """Return the device of the first tensor in nested containers; None if there is none."""
    return next((tensor.device for tensor in _tensors(value)), None)


def wants_grad(value: Any) -> bool:
    """Tell whether any tensor in nested containers requires a gradient."""
    return any(tensor.requires_grad for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name, None))
