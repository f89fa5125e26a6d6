"""Ask for what is paged, and bring it back for good."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from tuckaway.formats import Components
from tuckaway.paging.state import paging_of
from tuckaway.paging.units import as_device

__all__ = ["detach", "is_paged", "materialize", "offloaded_tensor"]


def is_paged(model: nn.Module, name: str) -> bool:
    """Tell whether the tensor of this full name is paged."""
    paging = paging_of(model)
    unit = None if paging is None else paging.plan.page_of(name)
    return paging is not None and unit is not None and not paging.pager.pages[unit.index].gone


def offloaded_tensor(model: nn.Module, name: str) -> Components | None:
    """Return a paged tensor's components from its home, without touching the slots; None if it is not paged.

    On the CPU; those of CPU pages are views of the arena, not to be written to.

    Raises:
        StoreCorrupt: the store's file is damaged.
        ChecksumError: bytes changed on disk.
    """
    paging = paging_of(model)
    return None if paging is None or not is_paged(model, name) else paging.homes.read(name)


def materialize(model: nn.Module, device: torch.device | str | int | None = None) -> nn.Module:
    """Bring every paged tensor of a model back and remove all hooks: it is an ordinary model again.

    Interrupted by Ctrl-C, it leaves a model that computes the same; called again, it does the rest.

    Args:
        model: a paged model; one that is not paged is returned as it is.
        device: where paged tensors go; ``None``: the device they execute on. Resident ones stay where they are.

    Raises:
        PagingError: a forward is under way.
        OutOfMemoryError: torch's, when the device has no room; the model stays paged, with some pages resident.

    Example:
        >>> import tuckaway
        >>> tuckaway.materialize(torch.nn.Linear(2, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """
    paging = paging_of(model)
    if paging is None:
        return model
    paging.bring_back(paging.pages, paging.plan.execution_device if device is None else as_device(device))
    for module, hook in paging.hooks:
        hook.remove()
        if module.__dict__.get("_hf_hook") is hook:
            del module.__dict__["_hf_hook"]
    with contextlib.suppress(AttributeError):
        del model.hf_device_map
    paging.end()  # last of all: interrupted before, it is called again and does the rest
    paging.hooks.clear()
    return model


detach = materialize
