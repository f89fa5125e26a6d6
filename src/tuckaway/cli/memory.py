"""Memory in use, and the most that was: of this process, and of tensors on the accelerator."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import psutil
import torch

__all__ = ["Memory", "memory", "peak_device_bytes", "peak_process_bytes"]


@dataclass(frozen=True)
class Memory:
    """Memory in use at one moment.

    Args:
        process_bytes: what this process has for itself.
        device_bytes: tensors on the accelerator; 0 without one.
    """

    process_bytes: int
    device_bytes: int


def memory() -> Memory:
    """Return what is in use now."""
    private = int(psutil.Process().memory_full_info().uss)
    return Memory(private, torch.accelerator.memory_allocated() if torch.accelerator.is_available() else 0)


def peak_process_bytes() -> int:
    """Return the most memory this process was resident with since it began, Python and torch included."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def peak_device_bytes() -> int:
    """Return the most that tensors took on the accelerator since the process began; 0 without one."""
    return torch.accelerator.max_memory_allocated() if torch.accelerator.is_available() else 0
