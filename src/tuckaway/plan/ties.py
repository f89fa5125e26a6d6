"""Which names of a model are one tensor.

Told by identity, so it works on the meta device too, where no tensor has an address. Every other part of the planner
counts, places and quantizes a tensor once, whatever number of names it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from tuckaway.errors import PlanError, nearest_names

__all__ = [
    "ancestors",
    "canonical_names",
    "find_tied_parameters",
    "named_tensors",
    "retie_parameters",
    "tied_groups",
]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter, then every buffer, under each of its names, in the model's order."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Return the names of tensors (parameters and buffers) that have more than one, grouped, in the model's order."""
    return [names for names in _names_by_tensor(named_tensors(model)) if len(names) > 1]


def find_tied_parameters(model: nn.Module) -> list[list[str]]:
    """Return the names of parameters that have more than one, grouped, in the model's order.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> model[1].weight = model[0].weight
        >>> find_tied_parameters(model)
        [['0.weight', '1.weight']]
    """
    groups = _names_by_tensor(model.named_parameters(remove_duplicate=False))
    return [names for names in groups if len(names) > 1]


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Return, for every name of every tensor, the first name of that tensor."""
    return {name: names[0] for names in _names_by_tensor(named_tensors(model)) for name in names}


def retie_parameters(model: nn.Module, tied_params: Sequence[Sequence[str]]) -> None:
    """Make the names of each group one parameter again: the first of them that is not on the meta device.

    Args:
        model: the model to change.
        tied_params: groups of names, as :func:`find_tied_parameters` gives them.

    Raises:
        PlanError: a name that is not in the model.
    """
    tensors = dict(named_tensors(model))
    for group in tied_params:
        for name in group:
            if name not in tensors:
                raise PlanError(
                    f"{name!r} is not in the model",
                    where="tied_params",
                    hint=nearest_names(name, tensors) or None,
                )
        kept = next((tensors[name] for name in group if not tensors[name].is_meta), None)
        if kept is None:
            continue
        for name in group:
            if tensors[name] is not kept:
                path, _, own = name.rpartition(".")
                setattr(model.get_submodule(path), own, kept)


def _names_by_tensor(named: Iterator[tuple[str, torch.Tensor]]) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, tensor in named:
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def ancestors(name: str) -> Iterator[str]:
    """Yield the name, then every module it lies in, ending with the root ``""``.

    >>> list(ancestors("a.b"))
    ['a.b', 'a', '']
    """
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""
