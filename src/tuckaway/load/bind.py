"""Put loaded tensors into a model: the only step that changes it, taken when everything else has succeeded."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from tuckaway.empty.records import recorded
from tuckaway.errors import MismatchError
from tuckaway.load.match import Match
from tuckaway.load.place import OnDevice
from tuckaway.tensor import TensorSpec

__all__ = ["bind_kept", "bind_resident", "check_kept"]


def bind_resident(model: nn.Module, match: Match, resident: Mapping[tuple[str, ...], OnDevice]) -> None:
    """Make the loaded tensors parameters and buffers of their modules; tied names get one object."""
    for feed in match.feeds:
        place = resident.get(feed.names)
        if place is not None:
            tensor = feed.spec.build(place.components)
            for name in feed.names:
                _assign(model, name, tensor)


def check_kept(model: nn.Module, match: Match) -> None:
    """Refuse a tensor that neither the checkpoint nor the model has a value for.

    Raises:
        MismatchError: a buffer that is in no checkpoint (non-persistent) is on the meta device.
    """
    for name in match.kept:
        tensor = _lookup(model, name)
        if tensor.is_meta and recorded(tensor) is None:
            raise MismatchError(
                "a buffer is in no checkpoint and on the meta device",
                where=name,
                hint="build the model under tuckaway.init_empty_weights(), which keeps buffers real",
            )


def bind_kept(
    model: nn.Module,
    match: Match,
    specs: Mapping[str, TensorSpec],
    device_of: Callable[[str], torch.device | None],
) -> None:
    """Move what keeps its value to the device it is placed on; ``None`` leaves it where it is."""
    moved: dict[int, torch.Tensor] = {}
    for name in match.kept:
        tensor, device = _lookup(model, name), device_of(name)
        if device is None:
            continue
        cast = cast_kept(tensor, specs[name])
        if tensor.device == device and cast is tensor:
            continue
        if id(tensor) not in moved:
            fresh = cast.detach().to(device=device)
            moved[id(tensor)] = fresh if specs[name].is_buffer else nn.Parameter(fresh, tensor.requires_grad)
        _assign(model, name, moved[id(tensor)])


def cast_kept(tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return a kept tensor in its final dtype; what no checkpoint holds (a rotary frequency) keeps its own."""
    return tensor if tensor.dtype == spec.dtype or not spec.persistent else tensor.detach().to(spec.dtype)


def restoration(model: nn.Module) -> Callable[[], None]:
    """Remember every parameter and buffer of the model; the function that is returned puts them back."""
    before = [
        (tensors, dict(tensors))
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
    ]

    def restore() -> None:
        for tensors, old in before:
            tensors.update(old)  # type: ignore[arg-type]

    return restore


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _lookup(model: nn.Module, name: str) -> torch.Tensor:
    module, leaf = _owner(model, name)
    tensor = module._parameters.get(leaf)
    return tensor if tensor is not None else module._buffers[leaf]  # type: ignore[return-value]


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    module, leaf = _owner(model, name)
    if leaf in module._parameters:
        module._parameters[leaf] = tensor  # type: ignore[assignment]
    else:
        module._buffers[leaf] = tensor
