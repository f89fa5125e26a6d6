"""Parameters that a model computes and never saves (Marian's sinusoidal positions): :func:`never_saved`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuckaway.checkpoint import TensorEntry
from tuckaway.load.merging import ComputedEntry

__all__ = ["never_saved"]


def never_saved(model: Any, entries: Mapping[str, TensorEntry], path: Path) -> dict[str, TensorEntry]:
    """Return what the model's own initialization makes of the parameters that it leaves out of its checkpoints.

    Args:
        model: a transformers model; may be empty.
        entries: what the checkpoint has.
        path: one of its files, for messages.
    """
    names = set(getattr(model, "_keys_to_ignore_on_save", None) or ()) - entries.keys()
    found: dict[str, TensorEntry] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in names:
            like = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            found[name] = ComputedEntry(name, like, path, partial(_initialized, model, name))
    return found


def _initialized(model: Any, name: str) -> torch.Tensor:
    owner, _, own = name.rpartition(".")
    module = copy.copy(model.get_submodule(owner))
    old = module._parameters[own]
    fresh = nn.Parameter(torch.full(old.shape, float("nan"), dtype=old.dtype), requires_grad=False)
    module._parameters = {**module._parameters, own: fresh}
    with torch.no_grad():
        model._init_weights(module)
    return fresh.detach()
