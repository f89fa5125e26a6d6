"""What the deferral must know of an aten operation: whether it makes, fills, copies a shape, writes."""

from __future__ import annotations

from enum import Enum, auto
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["LIKES", "Kind", "kind_of", "written_by"]

aten = torch.ops.aten
LIKES = {
    packet.default
    for packet in (
        aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like,
        aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty_strided,
    )
}  # fmt: skip
"""They take a shape from their argument, not values: known even when that is a parameter."""


class Kind(Enum):
    """Kinds of operations."""

    FACTORY = auto()
    """Makes a tensor from no other, on a device it is told."""
    FILL = auto()
    """Writes to its first argument and looks at no other tensor: what initializes weights."""
    OTHER = auto()


@cache
def kind_of(function: Any) -> Kind:
    """Tell the kind of an operation from its schema."""
    arguments = function._schema.arguments
    tensors = [a for a in arguments if "Tensor" in str(a.type)]
    if not tensors and any(a.name == "device" for a in arguments):
        return Kind.FACTORY
    # torch 2.11 has no tag for operations in place
    writes = bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write
    fills = writes and torch.Tag.inplace_view not in function.tags
    if fills and len(tensors) == 1 and tensors[0] is arguments[0] and str(tensors[0].type) == "Tensor":
        return Kind.FILL
    return Kind.OTHER


def written_by(function: Any, flat: list[Any], structure: Any) -> list[torch.Tensor]:
    """Return the tensors among its arguments that a call writes to."""
    schema = function._schema
    if not schema.is_mutable:
        return []
    args, kwargs = tree_unflatten(flat, structure)
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    values = [
        given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
    ]
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, torch.Tensor)]
