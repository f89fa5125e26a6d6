"""What every launch of a Triton kernel needs: the right device, and which of two ways to compute a reciprocal."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from tuckaway_kernels.backend import interpreting
from tuckaway_kernels.reciprocal import reciprocal_table


@cache
def has_ptx() -> bool:
    """Tell whether kernels may contain inline PTX: on NVIDIA GPUs, not in the interpreter, not on ROCm or XPU."""
    return torch.version.cuda is not None and not interpreting()


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make ``tensor``'s device the current one, where Triton launches; costs nothing if it is already."""
    index = tensor.device.index
    if tensor.device.type == "cpu" or index == torch.accelerator.current_device_index():
        return nullcontext()
    return torch.accelerator.device_index(index)


@cache
def kernel_reciprocal_table(device: torch.device) -> torch.Tensor:
    """Return the table that kernels without PTX take the reciprocal from; with PTX, one byte never read."""
    if has_ptx():
        return torch.zeros(1, dtype=torch.int8, device=device)
    return reciprocal_table(device)
