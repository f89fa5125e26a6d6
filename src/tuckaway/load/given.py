"""Values for the empty tensors of a model, from a state dict or from files that accelerate offloaded to.

accelerate writes one ``<name>.dat`` of raw bytes a tensor and an ``index.json``, or takes an index of safetensors
files. Either is mapped, so that a tensor's bytes are read when it is placed, and none is held.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from tuckaway.checkpoint.index import resolve_inside
from tuckaway.errors import CheckpointError, CheckpointNotFound, KeyMismatch, ShapeMismatch

__all__ = ["give_values"]


def give_values(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None,
    folder: str | os.PathLike[str] | None,
    index: Mapping[str, Mapping[str, Any]] | None,
) -> bool:
    """Bind the values that a caller gives, and those of a folder to what is on the meta device; nothing else.

    A folder that accelerate offloaded another model to, some time ago, thus changes no tensor that has a value.

    Args:
        model: the model to change.
        state_dict: values by name.
        folder: where accelerate offloaded to.
        index: accelerate's ``offload_index``; ``None``: the folder's ``index.json``, where there is one.

    Returns:
        Whether the folder holds accelerate's files.

    Raises:
        KeyMismatch: a tensor on the meta device without a value.
        ShapeMismatch: a value of another shape.
        CheckpointError: an index that makes no sense, a file that is missing or short.
    """
    tensors = dict(_named(model))
    state, given, found = state_dict or {}, index or {}, _index(folder)
    sources: dict[int, Callable[[], torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name in state:
            sources.setdefault(id(tensor), partial(state.__getitem__, name))
        elif name in given or (name in found and tensor.is_meta):
            entry = given[name] if name in given else found[name]
            sources.setdefault(id(tensor), partial(_read, name, entry, folder))
    bare = next((n for n, tensor in tensors.items() if tensor.is_meta and id(tensor) not in sources), None)
    if bare is not None:
        raise KeyMismatch(
            f"{bare!r} is on the meta device and has no value",
            hint="load a checkpoint, or pass state_dict, or the offload_index it is in",
        )
    made: dict[int, torch.Tensor] = {}
    for name, before in tensors.items():
        if id(before) not in sources:
            continue
        if id(before) not in made:
            value = sources[id(before)]()
            if tuple(value.shape) != tuple(before.shape):
                raise ShapeMismatch(f"{name!r} is {list(value.shape)}, and {list(before.shape)} in the model")
            parameter = isinstance(before, nn.Parameter)
            made[id(before)] = nn.Parameter(value, before.requires_grad) if parameter else value
        module, own = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        holder: Any = module._parameters if own in module._parameters else module._buffers
        holder[own] = made[id(before)]
    return bool(found)


def _named(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _index(folder: str | os.PathLike[str] | None) -> Mapping[str, Mapping[str, Any]]:
    path = None if folder is None else Path(folder) / "index.json"
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the offload index: {error}", where=path) from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise CheckpointError("the offload index maps no names to entries", where=path)
    return content


def _read(name: str, entry: Mapping[str, Any], folder: str | os.PathLike[str] | None) -> torch.Tensor:
    try:
        dtype = getattr(torch, str(entry["dtype"]).removeprefix("torch."))
        if "safetensors_file" in entry:
            with safe_open(entry["safetensors_file"], framework="pt") as file:
                value: torch.Tensor = file.get_tensor(entry.get("weight_name", name))
                return value.to(dtype)
        shape = tuple(int(size) for size in entry["shape"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the offload index makes no sense: {error}", where=name) from error
    except OSError as error:
        raise CheckpointNotFound(
            f"cannot read {name!r}: {error}", where=entry.get("safetensors_file")
        ) from error
    if folder is None:
        raise CheckpointNotFound(f"{name!r} is in a folder, and none is given", hint="pass offload_dir")
    path = resolve_inside(Path(folder), f"{name}.dat")
    count = torch.Size(shape).numel()
    if not path.is_file() or path.stat().st_size < count * dtype.itemsize:
        raise CheckpointNotFound(f"the offloaded weight {name!r} is missing or short", where=path)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    mapped: torch.Tensor = torch.from_file(str(path), shared=False, size=count, dtype=dtype)
    return mapped.view(shape)
