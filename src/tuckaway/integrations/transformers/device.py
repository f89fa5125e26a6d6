"""Where a paged transformers model takes its inputs: :func:`adapt`.

``inputs.to(model.device)`` is how everybody feeds a model. transformers answers with the device of the first parameter,
which is the meta device while that is paged out; a paged model answers with the device it executes on.
"""

from __future__ import annotations

from typing import Any

import torch

from tuckaway.paging import paging_of

__all__ = ["adapt"]


def adapt() -> None:
    """Teach ``PreTrainedModel.device`` about pages; once or often."""
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
    PreTrainedModel.device = property(device)  # type: ignore[assignment, method-assign]
