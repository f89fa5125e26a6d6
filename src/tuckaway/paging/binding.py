"""A page of a running model, and the places in its modules where its tensors show while it is in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tuckaway.errors import PagingError
from tuckaway.formats import Components
from tuckaway.paging.slots import Slot
from tuckaway.paging.units import PageUnit
from tuckaway.tensor import TensorSpec

if TYPE_CHECKING:
    from tuckaway.paging.capture import Turns

__all__ = ["Binding", "Page", "Turn", "guard"]


class Binding:
    """One place in a module where a paged tensor shows while its page is in."""

    __slots__ = ("attribute", "away", "module", "name", "tensors")

    def __init__(
        self, module: nn.Module, attribute: str, name: str, is_buffer: bool, away: torch.Tensor
    ) -> None:
        self.module = module
        self.attribute = attribute
        self.name = name
        self.tensors: dict[str, Any] = module._buffers if is_buffer else module._parameters
        self.away = away


class Turn:
    """A page brought in for one forward.

    Attributes:
        page: which.
        slot: which slot it reads; None when it has storage of its own.
        scope: the graph it is part of.
    """

    __slots__ = ("page", "scope", "slot")

    def __init__(self, page: Page) -> None:
        self.page = page
        self.slot: Slot | None = None
        self.scope: Turns | None = None


class Page:
    """A page of a running model.

    Attributes:
        unit: what it holds.
        specs: form of each of its tensors.
        bindings: where they show.
        users: turns that read its slot now.
        turns: turns that it is bound for now, with a slot or without.
        slot: where it is, or is being brought; None when it is only at home.
        own: bound tensors have storage of their own.
        captured: its turns are part of a graph that is being captured.
        gone: it was taken out of paging for good.
    """

    __slots__ = ("bindings", "captured", "gone", "own", "slot", "specs", "turns", "unit", "users")

    def __init__(self, unit: PageUnit, specs: Mapping[str, TensorSpec], bindings: Iterable[Binding]) -> None:
        self.unit = unit
        self.specs = {name: specs[name] for name in unit.tensors}
        self.bindings = list(bindings)
        # sets, not counts: to end a turn twice, or one that an interrupt left half begun, does no harm
        self.users: set[Turn] = set()
        self.turns: set[Turn] = set()
        self.slot: Slot | None = None
        self.own = False
        self.captured = False
        self.gone = False

    def build(self, buffer: torch.Tensor, *, with_grad: bool) -> tuple[torch.Tensor, ...]:
        """Make the tensors of every binding as views of ``buffer``; ties stay ties."""
        # not torch.no_grad, which an interrupt between its lines leaves without its end: this guard has no lines
        with torch._C._InferenceMode(False):
            torch._C._set_grad_enabled(False)
            views = self.unit.layout.views(buffer)
            parts: dict[str, Components] = {}
            for (name, component), view in views.items():
                parts.setdefault(name, {})[component] = view
            built = {}
            for binding in self.bindings:
                if binding.name not in built:
                    wants = with_grad and binding.away.requires_grad
                    spec = dataclasses.replace(self.specs[binding.name], requires_grad=wants)
                    tensor = spec.build(parts[binding.name])
                    if wants:
                        guard(tensor, binding.name)
                    built[binding.name] = tensor
            return tuple(built[binding.name] for binding in self.bindings)


def guard(parameter: torch.Tensor, name: str) -> None:
    """Make a gradient that would be lost with the page an error, instead of training that does nothing."""

    def refuse(_: torch.Tensor) -> None:
        raise PagingError(
            f"{name!r} is paged and would lose its gradient",
            hint="freeze it (requires_grad_(False)) or map its module to the execution device",
        )

    parameter.register_hook(refuse)
