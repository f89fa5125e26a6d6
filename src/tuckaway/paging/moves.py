"""What a paged model does when it is moved or converted as a whole: nothing if nothing would change, else it refuses.

Trainers, pipelines and ``Accelerator.prepare`` move every model to their device, most of the time to where it executes
already. A wrapper around a paged model (peft's, a trainer's) never calls the model's own ``to``: torch goes through
``_apply`` of every module below, so that is answered as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from tuckaway.errors import PagingError
from tuckaway.paging.state import MOVES

__all__ = ["guard_moves"]


def guard_moves(model: nn.Module, execution_device: torch.device) -> None:
    """Replace the methods of a paged model that would move or convert tensors which are elsewhere."""
    for name in MOVES:
        if hasattr(model, name):
            model.__dict__[name] = _refusal(name)
    model.__dict__["to"] = _to(weakref.ref(model), execution_device)
    model.__dict__["_apply"] = _apply(weakref.ref(model), execution_device)


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise PagingError(
            f"a paged model cannot be moved or converted as a whole ({name})",
            hint="load it with another device_map or dtype, or bring it back first: tuckaway.materialize(model)",
        )

    refuse.__name__ = name
    return refuse


def _to(model: weakref.ref[nn.Module], execution_device: torch.device) -> Callable[..., Any]:
    def to(*args: Any, **kwargs: Any) -> Any:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None or (device is not None and not _same(device, execution_device)):
            _refusal("to")()
        return model()

    return to


def _apply(model: weakref.ref[nn.Module], execution_device: torch.device) -> Callable[..., Any]:
    def apply(function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        probe = torch.empty(1, device=execution_device)
        changed = function(probe)
        if changed.dtype != probe.dtype or not _same(changed.device, execution_device):
            _refusal("_apply")()
        return model()

    return apply


def _same(device: torch.device, other: torch.device) -> bool:
    return device.type == other.type and (device.index is None or device.index == other.index)
