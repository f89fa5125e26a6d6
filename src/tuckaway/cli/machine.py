"""What a measured figure depends on: the device, the cores, the versions."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

import tuckaway

__all__ = ["conditions", "device_name"]

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors")


def conditions() -> dict[str, Any]:
    """Return the device, the cores, the memory and the versions, for ``--json``."""
    versions = {"tuckaway": tuckaway.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "device": device_name(),
        "cores": psutil.cpu_count(logical=True),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "versions": versions,
    }


def device_name() -> str:
    """Return the name of the device that executes."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    return f"CPU, {platform.machine()}"
