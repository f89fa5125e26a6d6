"""Place a model that has its weights already: accelerate's ``dispatch_model``, ``cpu_offload`` and ``disk_offload``.

They are the loader's job without a checkpoint: quantized weights stay quantized, plain ones stay plain. Parameters are
accelerate's, in its order, and have its meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuckaway.load.bind import restoration
from tuckaway.load.given import give_values
from tuckaway.load.job import run, with_preloaded
from tuckaway.paging import paging_of
from tuckaway.plan import Plan

__all__ = ["cpu_offload", "disk_offload", "dispatch_model"]

Device = int | str | torch.device


def dispatch_model(
    model: nn.Module,
    device_map: Mapping[str, Device] | Plan,
    main_device: Device | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    offload_dir: str | Path | None = None,
    offload_index: Mapping[str, Mapping[str, Any]] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | Sequence[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
    *,
    no_split_module_classes: Sequence[str] | None = None,
    slots: int | None = None,
    disk_cache_bytes: int | str = 0,
) -> nn.Module:
    """Place the blocks of a model over GPU, CPU and disk.

    Args:
        model: a model with real weights, quantized or not. Tensors on the meta device take their values from
            ``state_dict``, ``offload_index`` or what accelerate left in ``offload_dir``.
        device_map: module names to a GPU's number, ``"cpu"`` or ``"disk"``; must cover every parameter. Or a plan.
        main_device: device that executes; ``None``: the first GPU in the map, or the CPU.
        state_dict: values by name; the model's own, where it names none.
        offload_dir: folder for what is placed on disk; where accelerate offloaded weights to it, they are read there.
        offload_index: accelerate's: name to ``{"dtype", "shape"}`` of a ``.dat`` file in ``offload_dir``, or to
            ``{"safetensors_file", "weight_name", "dtype"}``. ``None``: the folder's own ``index.json``, and then
            only for what is on the meta device: such a folder may be another model's.
        offload_buffers: page the buffers of offloaded blocks too.
        skip_keys: keyword arguments that are not moved between devices.
        preload_module_classes: class names of modules that are paged whole because their children are used without
            being called. Blocks are paged whole anyway, so few models need it.
        force_hooks: move inputs to where the model is, even where all of it is on the CPU.
        no_split_module_classes: class names of modules that are paged whole. ``None``: what a transformers model
            names itself.
        slots: blocks on the executing device at once; ``None``: what a plan says, or two.
        disk_cache_bytes: host memory that a fixed part of the blocks on disk stays in once it was read.

    Returns:
        The same model, with ``hf_device_map``.

    Raises:
        PlanError: the map cannot be.
        KeyMismatch: a tensor on the meta device without a value.
        ShapeMismatch: a value of another shape.
        StoreError: the offload folder cannot be used.
        PagingError: the model is paged already. In every one of these cases the model is as it was.

    Example:
        >>> import tempfile, tuckaway
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        >>> model = dispatch_model(model, {"0": "cpu", "1": "disk"}, offload_dir=tempfile.mkdtemp())
        >>> model[1].weight.device, model(torch.zeros(1, 64)).shape
        (device(type='meta'), torch.Size([1, 64]))
        >>> tuckaway.materialize(model)[1].weight.device
        device(type='cpu')
    """
    restore = restoration(model)
    try:
        paged = paging_of(model)  # whose tensors are on the meta device and have values: run() refuses it
        if (paged is None or not paged.pages) and give_values(model, state_dict, offload_dir, offload_index):
            assert offload_dir is not None
            offload_dir = Path(offload_dir) / "tuckaway"  # beside accelerate's files, which stay as they are
        return run(
            model,
            None,
            None,
            device_map=device_map,
            no_split_module_classes=with_preloaded(model, no_split_module_classes, preload_module_classes),
            max_memory=None,
            offload_folder=offload_dir,
            main_device=main_device,
            offload_buffers=offload_buffers,
            skip_keys=skip_keys,
            strict=True,
            progress=False,
            hooks=True if force_hooks else None,
            slots=slots,
            disk_cache_bytes=disk_cache_bytes,
        )
    except BaseException:
        restore()
        raise


def cpu_offload(
    model: nn.Module,
    execution_device: Device | None = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    preload_module_classes: Sequence[str] | None = None,
) -> nn.Module:
    """Keep every block in RAM and page it onto ``execution_device`` (the GPU where there is one) for its turn.

    Args:
        model: as in :func:`dispatch_model`.
        execution_device: device that executes.
        offload_buffers: as there.
        state_dict: as there.
        preload_module_classes: as there.

    Raises:
        TuckawayError: as there.
    """
    return dispatch_model(
        model,
        {"": "cpu"},
        _executing(execution_device),
        state_dict,
        offload_buffers=offload_buffers,
        preload_module_classes=preload_module_classes,
    )


def disk_offload(
    model: nn.Module,
    offload_dir: str | Path,
    execution_device: Device | None = None,
    offload_buffers: bool = False,
    preload_module_classes: Sequence[str] | None = None,
) -> nn.Module:
    """Keep every block on disk and page it onto ``execution_device`` (the GPU where there is one) for its turn.

    Args:
        model: as in :func:`dispatch_model`.
        offload_dir: as there.
        execution_device: device that executes.
        offload_buffers: as there.
        preload_module_classes: as there.

    Raises:
        TuckawayError: as there.
    """
    return dispatch_model(
        model,
        {"": "disk"},
        _executing(execution_device),
        offload_dir=offload_dir,
        offload_buffers=offload_buffers,
        preload_module_classes=preload_module_classes,
    )


def _executing(device: Device | None) -> Device:
    if device is not None:
        return device
    return torch.accelerator.current_device_index() if torch.accelerator.is_available() else "cpu"
