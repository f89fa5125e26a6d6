"""The public functions that load a checkpoint: what they take, and what they make of it for the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuckaway.checkpoint import Checkpoint
from tuckaway.config import QuantizationConfig
from tuckaway.errors import ConfigError
from tuckaway.load.job import DeviceMap, run, with_preloaded
from tuckaway.load.merging import Merge, Split
from tuckaway.plan import Plan

__all__ = ["load_and_quantize_model", "load_checkpoint_and_dispatch"]


def load_and_quantize_model(
    model: nn.Module,
    quantization_config: QuantizationConfig | Any = None,
    weights_location: str | Path | None = None,
    device_map: DeviceMap | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    offload_state_dict: bool = False,
    *,
    bnb_quantization_config: Any = None,
    main_device: int | str | torch.device | None = None,
    offload_buffers: bool = False,
    skip_keys: str | Sequence[str] | None = None,
    strict: bool = True,
    allow_pickle: bool = True,
    verify_checksums: bool = True,
    non_finite: str = "raise",
    revision: str | None = None,
    slots: int | None = None,
    disk_cache_bytes: int | str = 0,
    key_mapping: Mapping[str, str] | None = None,
    conversions: Sequence[Merge | Split] = (),
    progress: bool | None = None,
) -> nn.Module:
    """Load a checkpoint into a model, quantizing its weights on the way, wherever they are placed.

    Args:
        model: built under :func:`~tuckaway.init_empty_weights`, or with real weights, which are then quantized where
            no ``weights_location`` is given.
        quantization_config: a :class:`~tuckaway.QuantizationConfig`, accelerate's ``BnbQuantizationConfig``,
            transformers' ``BitsAndBytesConfig`` or a format's name; none of them is changed. ``None``: what the
            checkpoint's own ``config.json`` says, or the default (nf4, nested).
        weights_location: a safetensors file, an index of shards, a folder, a ``pytorch_model.bin`` or a Hub id. An
            already quantized checkpoint, bitsandbytes' own included, keeps its format.
        device_map: ``None`` (everything on the GPU, or on the CPU where there is none), ``"auto"``, ``"balanced"``,
            ``"balanced_low_0"``, ``"sequential"``, ``"cpu"``, a dict of module names to a GPU's number, ``"cpu"`` or
            ``"disk"``, or a :class:`~tuckaway.Plan`, whose slots, format and other settings are used too. Blocks on
            ``"cpu"`` and ``"disk"`` are paged onto the executing device for their turn.
        no_split_module_classes: class names of modules that must lie on one device, such as decoder layers. ``None``:
            those that a transformers model names itself.
        max_memory: bytes a device may take, by device (``{0: "2GB", "cpu": "16GB"}``), for the named maps.
        offload_folder: folder for what is placed on disk.
        offload_state_dict: accepted as accelerate has it; loading never holds a state dict in memory.
        bnb_quantization_config: accelerate's name for ``quantization_config``.
        main_device: device that executes. ``None``: the first GPU in the map, or the CPU when it names none.
        offload_buffers: page the buffers of offloaded blocks too; otherwise they stay on the executing device.
        skip_keys: keyword arguments that are not moved between devices on the way into a block.
        strict: refuse a checkpoint with tensors the model has no place for.
        allow_pickle: read ``pytorch_model.bin`` files (always with ``weights_only``). ``TUCKAWAY_ALLOW_PICKLE=0`` in
            the environment refuses them all.
        verify_checksums: compare what is read with the checksums that tuckaway writes into its checkpoints.
        non_finite: ``"raise"`` a NonFiniteError for NaN or infinity in a weight that is to be quantized, of whose block
            no scale can be made, or ``"keep"``: quantize all the same. Weights that stay floats may hold them.
        revision: branch, tag or commit of a Hub id.
        slots: blocks on the executing device at once. ``None``: what a plan says, or two, which let the next block
            come while one computes; each more, of the largest block's size, lets another one stay, or come, earlier.
        disk_cache_bytes: host memory (``"8GB"``) that a fixed part of the blocks on disk stays in once it was read.
        key_mapping: regular expressions of names in the checkpoint to what replaces them, applied in this order; as
            transformers has it. What wrappers add to all names (``module.``, ``_orig_mod.``), or a prefix that one
            side lacks (``model.``), is found without, and so are the rules that transformers has for its own models.
        conversions: :class:`~tuckaway.Merge` and :class:`~tuckaway.Split`: tensors of the checkpoint to join or cut.
        progress: show a bar; ``None``: when standard error is a terminal.

    Returns:
        The same model, with ``hf_device_map`` and ``quantization_report``.

    Raises:
        ConfigError: a config that makes no sense, or an empty model without ``weights_location``.
        CheckpointError: something is wrong with the checkpoint's files.
        MismatchError: names, shapes or dtypes of model and checkpoint differ.
        PlanError: a device map that cannot be, a model that does not fit, ``"disk"`` without ``offload_folder``.
        PagingError: the model is paged already.
        StoreError: the offload folder cannot be used.
        LoadOutOfMemoryError: memory ran out. In every one of these cases the model is as it was.

    Example:
        >>> import tempfile, tuckaway
        >>> folder = tempfile.mkdtemp()
        >>> tuckaway.save_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), folder)
        >>> with tuckaway.init_empty_weights():
        ...     model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
        >>> model = load_and_quantize_model(model, "nf4", weights_location=folder)
        >>> model[0].weight.format, model[1].weight.dtype  # the output head stays as it is
        ('nf4', torch.bfloat16)
    """
    given = quantization_config if quantization_config is not None else bnb_quantization_config
    if non_finite not in ("raise", "keep"):
        raise ConfigError(f"non_finite must be 'raise' or 'keep', not {non_finite!r}")
    checkpoint = _open(
        model,
        weights_location,
        revision=revision,
        allow_pickle=allow_pickle,
        verify_checksums=verify_checksums,
    )
    planned = device_map if given is None and isinstance(device_map, Plan) else None
    if planned is not None:
        given = planned.quantization_config
    elif given is None and checkpoint is not None:
        given = _own_config(checkpoint)
    unquantized = planned is not None and given is None
    config = None if unquantized else QuantizationConfig.of(given if given is not None else "nf4")
    return run(
        model,
        checkpoint,
        config,
        dtype=None if planned is None else planned.dtype,
        device_map=device_map,
        no_split_module_classes=no_split_module_classes,
        max_memory=max_memory,
        offload_folder=offload_folder,
        main_device=main_device,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        strict=strict,
        slots=slots,
        disk_cache_bytes=disk_cache_bytes,
        key_mapping=key_mapping,
        conversions=conversions,
        non_finite=non_finite,
        progress=progress,
        # a pattern of ours that matches nothing is a mistake; others' configs name modules of many models
        own_config=isinstance(given, QuantizationConfig),
    )


def _own_config(checkpoint: Checkpoint) -> Any:
    """Return what a checkpoint says of its own weights; 8-bit floats are a way to store them, and say nothing."""
    given = (checkpoint.config() or {}).get("quantization_config")
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    return None if method in ("fp8", "fbgemm_fp8", "compressed-tensors") else given


def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: str | Path,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    offload_folder: str | Path | None = None,
    offload_buffers: bool = False,
    dtype: torch.dtype | str | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: str | Sequence[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
    strict: bool = False,
    *,
    main_device: int | str | torch.device | None = None,
    slots: int | None = None,
    disk_cache_bytes: int | str = 0,
    progress: bool | None = None,
) -> nn.Module:
    """Load a checkpoint into a model as it is, unquantized, and place it over GPU, CPU and disk.

    accelerate's function of this name, with its parameters. A checkpoint that is quantized already stays quantized.

    Args:
        model: built under :func:`~tuckaway.init_empty_weights`.
        checkpoint: as ``weights_location`` of :func:`load_and_quantize_model`.
        device_map: as there.
        max_memory: as there.
        no_split_module_classes: as there.
        offload_folder: as there.
        offload_buffers: as there.
        dtype: dtype of all float tensors; ``None``: the checkpoint's stay what the model has.
        offload_state_dict: accepted; loading never holds a state dict in memory.
        skip_keys: as there.
        preload_module_classes: class names of modules that are paged whole, like ``no_split_module_classes``.
        force_hooks: move inputs to where the model is, even where all of it is on the CPU.
        strict: refuse a checkpoint with tensors the model has no place for; missing ones are always refused.
        main_device: as there.
        slots: as there.
        disk_cache_bytes: as there.
        progress: as there.

    Raises:
        TuckawayError: as :func:`load_and_quantize_model`.
    """
    source = _open(model, checkpoint, revision=None, allow_pickle=True, verify_checksums=True)
    return run(
        model,
        source,
        None,
        dtype=device_map.dtype if dtype is None and isinstance(device_map, Plan) else dtype,
        device_map=device_map,
        no_split_module_classes=with_preloaded(model, no_split_module_classes, preload_module_classes),
        max_memory=max_memory,
        offload_folder=offload_folder,
        main_device=main_device,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        strict=strict,
        hooks=True if force_hooks else None,
        slots=slots,
        disk_cache_bytes=disk_cache_bytes,
        progress=progress,
    )


def _open(
    model: nn.Module,
    location: str | Path | None,
    *,
    revision: str | None,
    allow_pickle: bool,
    verify_checksums: bool,
) -> Checkpoint | None:
    if location is not None:
        return Checkpoint.open(
            location, revision=revision, allow_pickle=allow_pickle, verify_checksums=verify_checksums
        )
    empty = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if empty is not None:
        raise ConfigError(
            "the model is empty and weights_location is None", where=empty, hint="name a checkpoint"
        )
    return None
