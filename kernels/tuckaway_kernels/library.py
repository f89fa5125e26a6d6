"""The torch.library namespace ``tuckaway`` and the one way an op enters it.

An op has a reference (any device) and, where Triton is installed, a launcher for the devices Triton serves.
``Library.define`` and ``impl`` are used rather than ``torch.library.custom_op``, whose Python wrapper costs about
5 us more a call in eager mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tuckaway_kernels.backend import has_triton

LIBRARY = torch.library.Library("tuckaway", "FRAGMENT")

TRITON_KEYS = ("CUDA", "XPU")
"""Dispatch keys of the devices that Triton serves (ROCm answers to CUDA)."""


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    tags: tuple[torch.Tag, ...] = (torch.Tag.pt2_compliant_tag,),
) -> None:
    """Register an op under ``torch.ops.tuckaway``.

    Args:
        schema: the op's signature in torch's schema language, its name first.
        reference: serves every device that no launcher serves.
        fake: gives empty outputs of the right shape, dtype and device from fake inputs.
        triton: launches the kernels; imports Triton inside, at its first call.
        tags: torch's tags for the op.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=tags)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if triton is not None and has_triton():
        for key in TRITON_KEYS:
            LIBRARY.impl(name, triton, key)
    torch.library.register_fake(f"tuckaway::{name}", fake, lib=LIBRARY)
