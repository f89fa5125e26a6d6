"""What a paged transformers model does otherwise than transformers has it: :func:`adapt`.

``inputs.to(model.device)`` is how everybody feeds a model. transformers answers with the device of the first parameter,
which is the meta device while that is paged out; a paged model answers with the device it executes on. And its own
``load_adapter`` takes weights on the meta device for missing ones: peft's loads adapters beside pages.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from tuckaway.errors import PagingError
from tuckaway.paging import paging_of

__all__ = ["adapt"]


def adapt() -> None:
    """Teach ``PreTrainedModel`` about pages; once or often."""
    from transformers.modeling_utils import PreTrainedModel

    theirs: Any = PreTrainedModel.device
    if getattr(theirs.fget, "_tuckaway", False):
        return

    def device(self: Any) -> torch.device:
        paging = paging_of(self)
        if paging is not None:
            return paging.plan.execution_device
        found: torch.device = theirs.fget(self)
        return found

    device._tuckaway = True  # type: ignore[attr-defined]
    device.__doc__ = theirs.__doc__
    own_load_adapter: Any = PreTrainedModel.load_adapter

    @functools.wraps(own_load_adapter)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        if paging_of(self) is not None:
            raise PagingError(
                "transformers cannot load an adapter beside weights that are paged out",
                hint="use peft.PeftModel.from_pretrained(model, folder)",
            )
        return own_load_adapter(self, *args, **kwargs)

    PreTrainedModel.load_adapter = load_adapter  # type: ignore[method-assign]
    PreTrainedModel.device = property(device)  # type: ignore[assignment, method-assign]
