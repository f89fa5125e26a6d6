"""Turn a loaded model into a paged one: meta tensors, hooks, and what a paged model refuses."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

import torch
from torch import nn

from tuckaway.errors import PagingError
from tuckaway.paging.binding import Page
from tuckaway.paging.homes import PageHomes
from tuckaway.paging.hooks import PagedWeights, PageHook
from tuckaway.paging.moves import guard_moves
from tuckaway.paging.state import ATTRIBUTE, Paging, paging_of
from tuckaway.paging.tree import prefixes
from tuckaway.paging.units import PagePlan

__all__ = ["attach"]


def attach(
    model: nn.Module,
    plan: PagePlan,
    homes: PageHomes | None = None,
    *,
    slots: int = 2,
    skip_keys: str | Collection[str] | None = None,
    io_same_device: bool = True,
) -> Paging:
    """Make a model paged: its paged tensors are on the meta device but for their module's turn.

    Args:
        model: resident tensors are bound already, on their devices.
        plan: of :func:`~tuckaway.paging.plan_pages` for this model.
        homes: filled and committed; closed with the model's paging. May be None if the plan has no pages.
        slots: pages on the execution device at once.
        skip_keys: keyword arguments that are not moved to the execution device.
        io_same_device: bring the model's output to where its input was.

    Raises:
        PagingError: the model is paged already, or a tensor that is to be resident has no value.
    """
    if paging_of(model) is not None:
        raise PagingError(
            "the model is paged already", hint="bring it back first: tuckaway.materialize(model)"
        )
    if homes is None:
        homes = PageHomes.create(plan)
    for name in plan.resident:
        if _tensor(model, name).device.type == "meta":
            raise PagingError(
                f"{name!r} is to be resident and has no value", hint="load or initialize it first"
            )
    homes.commit()
    homes.pin()
    paging = Paging(model, plan, homes, slots)
    modules = dict(model.named_modules(remove_duplicate=False))
    for page in paging.pager.pages:
        for binding in page.bindings:
            binding.tensors[binding.attribute] = binding.away
    _hook(model, paging, modules, skip_keys, io_same_device)
    object.__setattr__(model, ATTRIBUTE, paging)
    if paging.pages:
        guard_moves(model, plan.execution_device)
    return paging


def _hook(
    model: nn.Module,
    paging: Paging,
    modules: dict[str, nn.Module],
    skip_keys: str | Collection[str] | None,
    io_same_device: bool,
) -> None:
    plan = paging.plan
    asked: dict[int, list[Page]] = {}
    holders: dict[int, list[Page]] = {}
    for page in paging.pager.pages:
        for asker in dict.fromkeys(id(modules[path]) for path in page.unit.askers):
            asked.setdefault(asker, []).append(page)
        for owner in dict.fromkeys(id(binding.module) for binding in page.bindings):
            holders.setdefault(owner, []).append(page)
    moved = {id(modules[path]): device for path, device in plan.moved.items()}
    below = _names_below(plan)
    done: set[int] = set()
    for path, module in modules.items():
        key = id(module)
        root = module is model
        if key in done or not (root or key in asked or key in holders or key in moved):
            continue
        done.add(key)
        driven = root or key in asked or key in moved
        device = moved.get(key, plan.execution_device)
        hook = PageHook(
            paging,
            module,
            asked.get(key, []) if driven else holders[key],
            device,
            io_same_device=root and io_same_device,
            root=root,
            skip_keys=skip_keys,
            weights=PagedWeights(paging, below.get(path, {})),
        )
        if driven:
            hook.drive()
        object.__setattr__(module, "_hf_hook", hook)
        paging.hooks.append((module, hook))


def _names_below(plan: PagePlan) -> dict[str, dict[str, str]]:
    """Return, for every path with paged tensors below it, their names from there on and in full."""
    below: dict[str, dict[str, str]] = {}
    for name in plan.specs:
        if plan.page_of(name) is not None:
            for path in islice(prefixes(name), 1, None):
                below.setdefault(path, {})[name[len(path) + 1 :] if path else name] = name
    return below


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    path, _, attribute = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), attribute)
    if not isinstance(tensor, torch.Tensor):
        raise PagingError(f"{name!r} is no tensor of the model")
    return tensor
