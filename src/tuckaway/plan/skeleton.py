"""A model's structure from the names and shapes of its checkpoint alone: for planning where there is no class.

The modules cannot run. What a weight is used for is told from its shape and name: a matrix is a linear layer's, or an
embedding's where it is called so; what has one dimension is not quantized whatever it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import nn

__all__ = ["skeleton_of"]

_EMBEDDING = re.compile(r"(^|[._])(embed\w*|wte|wpe|shared|tok_embeddings|word_embeddings)([._]|$)")


_HEADS = ("lm_head", "head", "output", "embed_out", "score", "classifier")
"""Names that models give the module that makes their outputs."""


class Skeleton(nn.Module):
    """A module of which only the names below it are known."""

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output head, known by its name."""
        return next((self._modules[name] for name in _HEADS if self._modules.get(name) is not None), None)

    def forward(self, *_: object, **__: object) -> NoReturn:
        """Refuse: the structure was read from a checkpoint, not the code."""
        raise NotImplementedError("a skeleton is for planning and cannot run")


def skeleton_of(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> nn.Module:
    """Build modules that hold tensors of the given names, shapes and dtypes, on the meta device.

    Args:
        tensors: shape and dtype by dotted name.

    Example:
        >>> model = skeleton_of({"layers.0.up.weight": ((8, 4), torch.float32)})
        >>> type(model.layers[0].up).__name__
        'Linear'
    """
    tree: dict[str, set[str]] = {"": set()}
    own: dict[str, dict[str, torch.Tensor]] = {}
    for name, (shape, dtype) in tensors.items():
        path, _, attribute = name.rpartition(".")
        own.setdefault(path, {})[attribute] = torch.empty(shape, dtype=dtype, device="meta")
        while path:
            above, _, child = path.rpartition(".")
            tree.setdefault(above, set()).add(child)
            path = above
    return _module("", tree, own)


def _module(
    path: str, tree: Mapping[str, set[str]], own: Mapping[str, Mapping[str, torch.Tensor]]
) -> nn.Module:
    children = sorted(tree.get(path, ()), key=lambda name: (not name.isdigit(), len(name), name))
    tensors = own.get(path, {})
    module = _leaf(path, tensors) if not children else Skeleton()
    if children and not tensors and children == [str(i) for i in range(len(children))]:
        module = nn.ModuleList()
    for child in children:
        module.add_module(child, _module(f"{path}.{child}" if path else child, tree, own))
    for name, tensor in tensors.items():
        parameter = nn.Parameter(tensor, requires_grad=False)
        if name in module._parameters:
            module._parameters[name] = parameter
        else:
            module.register_parameter(name, parameter)
    return module


def _leaf(path: str, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    weight = tensors.get("weight")
    if weight is None or weight.dim() != 2 or not set(tensors) <= {"weight", "bias"}:
        return Skeleton()
    rows, columns = weight.shape
    if _EMBEDDING.search(path.lower()):
        return nn.Embedding(rows, columns, device="meta")
    return nn.Linear(columns, rows, bias="bias" in tensors, device="meta")
