"""The order of the whole job: match, plan, validate, carry out."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from tuckaway.checkpoint import Checkpoint
from tuckaway.config import QuantizationConfig
from tuckaway.errors import ConfigError, LoadOutOfMemoryError, PagingError, PlanError, TuckawayError
from tuckaway.load.bind import check_kept
from tuckaway.load.carry import PIECE_BYTES, carry_out, fingerprint, kept_on_disk, named_state
from tuckaway.load.copies import check_copies
from tuckaway.load.match import Match, distinct, match_checkpoint, match_model
from tuckaway.load.merging import Merge, Split
from tuckaway.load.renaming import renamed
from tuckaway.load.state_hooks import after_hooks, extra_states
from tuckaway.paging import PageHomes, paging_of, plan_pages
from tuckaway.plan import (
    Plan,
    account,
    check_devices,
    choose_specs,
    executing_device,
    main_device_of,
    quantization_report,
    resolve_device_map,
    tied_groups,
)
from tuckaway.plan.memory import parse_bytes
from tuckaway.plan.ties import ancestors
from tuckaway.tensor import TensorSpec

__all__ = ["DeviceMap", "run", "with_preloaded"]

_log = logging.getLogger("tuckaway")

DeviceMap = Mapping[str, int | str | torch.device] | str | int | torch.device | Plan


def run(
    model: nn.Module,
    checkpoint: Checkpoint | None,
    config: QuantizationConfig | None,
    *,
    device_map: DeviceMap | None,
    no_split_module_classes: Sequence[str] | None,
    max_memory: Mapping[int | str, int | str] | None,
    offload_folder: str | Path | None,
    main_device: int | str | torch.device | None,
    offload_buffers: bool,
    skip_keys: str | Sequence[str] | None,
    strict: bool,
    progress: bool | None,
    dtype: torch.dtype | str | None = None,
    own_config: bool = True,
    keep_in_fp32: Sequence[str] = (),
    hooks: bool | None = None,
    slots: int | None = None,
    disk_cache_bytes: int | str = 0,
    key_mapping: Mapping[str, str] | None = None,
    conversions: Sequence[Merge | Split] = (),
    non_finite: str = "raise",
) -> nn.Module:
    """Do the whole job; ``checkpoint=None`` takes the weights that the model has. The public functions call this.

    Beyond their parameters: ``keep_in_fp32``, paths or trailing parts of paths of modules whose floats stay in fp32;
    and ``hooks``, whether inputs are moved to where a model without pages is (``None``: unless it is on the CPU).
    """
    planned = device_map if isinstance(device_map, Plan) else None
    if isinstance(device_map, Plan):
        slots = device_map.slots if slots is None else slots
        disk_cache_bytes = disk_cache_bytes or device_map.disk_cache_bytes
        no_split_module_classes = device_map.no_split_module_classes
        offload_buffers = device_map.offload_buffers
        main_device = device_map.execution_device if main_device is None else main_device
        device_map = device_map.device_map
    if no_split_module_classes is None:
        no_split_module_classes = sorted(getattr(model, "_no_split_modules", None) or ())
    paging = paging_of(model)
    if paging is not None and paging.pages:
        raise PagingError(
            "the model is paged already", hint="bring it back first: tuckaway.materialize(model)"
        )
    slots = 2 if slots is None else slots
    if slots < 1:
        raise ConfigError(f"slots must be at least 1, not {slots}")
    disk_cache_bytes = parse_bytes(disk_cache_bytes)
    wanted, reasons = choose_specs(model, config, dtype=dtype, strict=own_config)
    if keep_in_fp32:
        wanted = kept_in_fp32(wanted, keep_in_fp32)
    groups = tied_groups(model)
    notes: list[str] = []
    if checkpoint is not None:
        checkpoint, notes = renamed(
            checkpoint,
            model,
            [names for names in distinct(wanted, groups) if wanted[names[0]].persistent],
            key_mapping=key_mapping,
            conversions=conversions,
        )
        checkpoint = after_hooks(checkpoint, model)
    match = _match(model, checkpoint, wanted, groups, config, strict=strict, notes=notes)
    specs = {**wanted, **match.specs}
    placement = resolve_device_map(
        model,
        specs,
        device_map,
        max_memory=max_memory,
        no_split_module_classes=no_split_module_classes,
        offload_buffers=offload_buffers,
        slots=slots,
        disk_cache_bytes=disk_cache_bytes,
    )
    check_devices(placement)
    if main_device is None and not isinstance(device_map, Mapping):
        main_device = executing_device(device_map, max_memory, placement=placement)
    executing = main_device_of(placement, main_device)
    if offload_folder is None and any(str(place) == "disk" for place in placement.values()):
        raise PlanError(
            "blocks are placed on disk and offload_folder is None",
            where=next(name for name, place in placement.items() if str(place) == "disk")
            or "the whole model",
            hint="name a folder to page from",
        )
    plan = plan_pages(
        model,
        specs,
        placement,
        execution_device=executing,
        no_split_module_classes=no_split_module_classes,
        offload_buffers=offload_buffers,
        ties=groups,
    )
    if planned is not None:
        planned.check(_weights_by_device(model, specs, placement, planned))
    check_kept(model, match)
    check_copies(match, piece_bytes=PIECE_BYTES)
    message = None
    try:
        with ExitStack() as undo:
            # an interrupt inside torch.no_grad's own lines would leave the caller's thread without gradients
            undo.callback(torch.set_grad_enabled, torch.is_grad_enabled())
            homes = None
            if plan.pages:
                homes = PageHomes.create(
                    plan,
                    offload_folder=offload_folder,
                    fingerprint=fingerprint(checkpoint, kept_on_disk(model, match, plan)),
                    disk_cache_bytes=disk_cache_bytes,
                )
                undo.callback(homes.abort)
            carry_out(
                model, checkpoint, match, plan, homes,
                hooks=hooks, skip_keys=skip_keys, slots=slots, non_finite=non_finite, progress=progress,
            )  # fmt: skip
            undo.pop_all()
    except (MemoryError, RuntimeError, OSError) as error:
        if not _means_out_of_memory(error):
            raise
        message = str(error).partition("\n")[0]
    if message is not None:
        # out here, where that error is not its context: its traceback would keep everything loaded so far alive
        raise LoadOutOfMemoryError(
            f"memory ran out while loading: {message}",
            hint="place less on this device with max_memory or device_map",
        )
    report = quantization_report(specs, reasons, placement, ties=groups, notes=notes)
    # past the module's own __setattr__, which may refuse what it does not know
    object.__setattr__(model, "hf_device_map", dict(placement))
    object.__setattr__(model, "quantization_report", report)
    return model


def with_preloaded(
    model: nn.Module, whole: Sequence[str] | str | None, preloaded: Sequence[str] | str | None
) -> Sequence[str] | None:
    """Return the classes whose modules are paged whole, those included that accelerate would preload."""
    if not preloaded:
        return [whole] if isinstance(whole, str) else whole
    named = getattr(model, "_no_split_modules", None) if whole is None else whole
    together = [*([named] if isinstance(named, str) else named or ())]
    return [*together, *([preloaded] if isinstance(preloaded, str) else preloaded)]


def kept_in_fp32(specs: Mapping[str, TensorSpec], modules: Sequence[str]) -> dict[str, TensorSpec]:
    """Return the specs with the floats of some modules, named by a path or a trailing part of one, in fp32."""
    ends = tuple(f".{name}" for name in modules)

    def is_kept(name: str) -> bool:
        return any(f".{path}".endswith(ends) for path in ancestors(name.rpartition(".")[0]) if path)

    return {
        name: replace(spec, dtype=torch.float32)
        if spec.layout is None and spec.dtype.is_floating_point and is_kept(name)
        else spec
        for name, spec in specs.items()
    }


def _weights_by_device(
    model: nn.Module, specs: Mapping[str, TensorSpec], placement: Mapping[str, int | str], planned: Plan
) -> dict[int | str, int]:
    accounts = account(
        model,
        specs,
        placement,
        main=planned.execution_device,
        no_split_module_classes=planned.no_split_module_classes,
        offload_buffers=planned.offload_buffers,
    )
    return {device: memory.weights_bytes for device, memory in accounts.devices.items()}


def _match(
    model: nn.Module,
    checkpoint: Checkpoint | None,
    wanted: Mapping[str, TensorSpec],
    groups: Sequence[Sequence[str]],
    config: QuantizationConfig | None,
    *,
    strict: bool,
    notes: Sequence[str] = (),
) -> Match:
    if checkpoint is None:
        return match_model(wanted, groups, dict(named_state(model)))
    match = match_checkpoint(
        checkpoint,
        wanted,
        groups,
        config,
        real=[name for name, tensor in named_state(model) if not tensor.is_meta],
        ignored=getattr(model, "_keys_to_ignore_on_load_unexpected", None) or (),
        extra=extra_states(checkpoint, model),
        strict=strict,
    )
    for note in notes:
        _log.info("%s", note)
    if match.unexpected:
        _log.warning(
            "left out %d tensors that the model has no place for: %s",
            len(match.unexpected),
            match.unexpected[:5],
        )
    return match


def _means_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, TuckawayError):
        return False
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # mmap
    # torch's CPU allocator raises a bare RuntimeError
    return not isinstance(error, RuntimeError) or (
        isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
    )
