"""Place a model that has its weights already: accelerate's ``dispatch_model``, ``cpu_offload`` and ``disk_offload``.

They are the loader's job without a checkpoint: quantized weights stay quantized, plain ones stay plain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from tuckaway.load.load import run

__all__ = ["cpu_offload", "disk_offload", "dispatch_model"]


def dispatch_model(
    model: nn.Module,
    device_map: Mapping[str, int | str | torch.device],
    main_device: int | str | torch.device | None = None,
    offload_dir: str | Path | None = None,
    offload_buffers: bool = False,
    skip_keys: str | Sequence[str] | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    *,
    slots: int | None = None,
    disk_cache_bytes: int | str = 0,
) -> nn.Module:
    """Place the blocks of a loaded model over GPU, CPU and disk.

    Args:
        model: a model with real weights, quantized or not.
        device_map: module names to a GPU's number, ``"cpu"`` or ``"disk"``; must cover every parameter.
        main_device: device that executes; ``None``: the first GPU in the map, or the CPU.
        offload_dir: folder for what is placed on disk.
        offload_buffers: page the buffers of offloaded blocks too.
        skip_keys: keyword arguments that are not moved between devices.
        no_split_module_classes: class names of modules that are paged whole.
        slots: blocks on the executing device at once; ``None``: what a plan says, or two.
        disk_cache_bytes: host memory that a fixed part of the blocks on disk stays in once it was read.

    Returns:
        The same model, with ``hf_device_map``.

    Raises:
        PlanError: the map cannot be.
        StoreError: the offload folder cannot be used.
    """
    return run(
        model,
        None,
        None,
        device_map=device_map,
        no_split_module_classes=no_split_module_classes,
        max_memory=None,
        offload_folder=offload_dir,
        main_device=main_device,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        strict=True,
        progress=False,
        slots=slots,
        disk_cache_bytes=disk_cache_bytes,
    )


def cpu_offload(
    model: nn.Module, execution_device: int | str | torch.device | None = None, offload_buffers: bool = False
) -> nn.Module:
    """Keep every block in RAM and page it onto ``execution_device`` (the GPU where there is one) for its turn."""
    return dispatch_model(model, {"": "cpu"}, _executing(execution_device), offload_buffers=offload_buffers)


def disk_offload(
    model: nn.Module,
    offload_dir: str | Path,
    execution_device: int | str | torch.device | None = None,
    offload_buffers: bool = False,
) -> nn.Module:
    """Keep every block on disk and page it onto ``execution_device`` (the GPU where there is one) for its turn."""
    return dispatch_model(
        model,
        {"": "disk"},
        _executing(execution_device),
        offload_dir=offload_dir,
        offload_buffers=offload_buffers,
    )


def _executing(device: int | str | torch.device | None) -> int | str | torch.device:
    if device is not None:
        return device
    return torch.accelerator.current_device_index() if torch.accelerator.is_available() else "cpu"
