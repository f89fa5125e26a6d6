"""Pages for layers that are computed again in the backward pass: :class:`Recomputing`.

Activation checkpointing runs a layer's forward a second time. Where it calls the module, hooks bring the page in again.
transformers (5.24 on) checkpoints inside the module's forward instead, through a function that it keeps on the layer,
so nobody would be asked: that function is replaced by one that asks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

__all__ = ["Recomputing", "bring_in_again"]

_FUNCTION = "_gradient_checkpointing_func"
"""Where a transformers layer keeps what checkpoints it."""


class Recomputing:
    """A checkpointing function under which every run of the layer has its page.

    Args:
        checkpoint: the function that transformers put there.
        in_place: runs a function with the page in.
    """

    def __init__(self, checkpoint: Callable[..., Any], in_place: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint
        self.in_place = in_place

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint the function, with the page in whenever it runs."""
        return self.checkpoint(partial(self.in_place, function), *args, **kwargs)


def bring_in_again(module: nn.Module, in_place: Callable[..., Any]) -> None:
    """Let a layer that is checkpointed from inside have its page when it is computed again."""
    checkpoint = module.__dict__.get(_FUNCTION)
    if checkpoint is not None and not isinstance(checkpoint, Recomputing):
        module.__dict__[_FUNCTION] = Recomputing(checkpoint, in_place)
