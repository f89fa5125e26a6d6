"""The public planner: from whatever names a model to a :class:`~tuckaway.Plan`, with nothing allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tuckaway.config import QuantizationConfig, as_dtype
from tuckaway.errors import ConfigError, PlanError
from tuckaway.formats import registered_formats
from tuckaway.plan.accounts import account
from tuckaway.plan.blocks import planned_blocks
from tuckaway.plan.device_map import OFFLOADED, DeviceMap, Placement, class_names
from tuckaway.plan.expect import TYPICAL, Expected
from tuckaway.plan.machine import Speeds, known_speeds
from tuckaway.plan.memory import Device, MaxMemory, budgets, format_bytes, parse_bytes
from tuckaway.plan.planned import Plan
from tuckaway.plan.reserve import estimate_reserve
from tuckaway.plan.resolve import executing_device, resolve_device_map
from tuckaway.plan.select import choose_specs
from tuckaway.plan.sources import Source, find_source
from tuckaway.plan.ties import tied_groups
from tuckaway.tensor import TensorSpec

__all__ = ["plan"]

_SMALLER: tuple[tuple[str, dict[str, Any] | None], ...] = (
    ("bf16", None),
    ("int8", {"format": "int8"}),
    ("nf4", {"format": "nf4", "nested": True}),
)
"""What a budget can be fitted with, the most precise first: 16, 8 and 4.13 bits a weight."""


def plan(
    model_or_config: nn.Module | Any,
    quantization_config: QuantizationConfig | Any = None,
    device_map: Mapping[str, Placement] | Placement | Plan | None = "auto",
    max_memory: MaxMemory | None = None,
    no_split_module_classes: Sequence[str] | str | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    batch_size: int = 1,
    sequence_length: int = 2048,
    reserve_bytes: int | str | None = None,
    slots: int = 2,
    disk_cache_bytes: int | str = 0,
    offload_buffers: bool = False,
    fit: bool = False,
    speeds: Speeds | None = None,
    revision: str | None = None,
) -> Plan:
    """Plan where everything of a model goes, in exact bytes, before anything is allocated or downloaded.

    Args:
        model_or_config: a module, empty or real; a transformers configuration; a folder of a checkpoint; or an id on
            the Hub, of which only ``config.json`` and the headers of the weights are read.
        quantization_config: as in :func:`~tuckaway.load_and_quantize_model`; a float dtype or its name (``"bf16"``)
            for no quantization. ``None``: what the model's files say, or nf4 with nested scales.
        device_map: as there; of a plan, its map.
        max_memory: bytes that a device may take in all, by device; ``None``: what is free.
        no_split_module_classes: as there.
        dtype: dtype of what is not quantized; ``None``: the config's.
        batch_size: sequences at once, for the reserve.
        sequence_length: tokens of prompt and answer, for the reserve.
        reserve_bytes: kept free on the executing device for activations and the KV cache. ``None``: estimated from
            the model's configuration, batch and length.
        slots: pages that the executing device holds at once.
        disk_cache_bytes: RAM that blocks on disk may stay in once they were read.
        offload_buffers: page the buffers of offloaded blocks too.
        fit: choose the format too: the most precise one with which nothing is paged; if there is none, the placement
            with the most tokens a second. ``quantization_config`` then gives the other settings.
        speeds: what times are expected from; ``None``: what ``tuckaway doctor --measure`` found.
        revision: branch, tag or commit of a Hub id.

    Raises:
        PlanError: the model does not fit: by how many bytes (``shortfall_bytes``), and what would make it fit.
        ConfigError: a configuration that makes no sense.
        CheckpointNotFound: there is no such model.

    Example:
        >>> import tuckaway
        >>> with tuckaway.init_empty_weights():
        ...     model = nn.Sequential(*[nn.Linear(4096, 4096) for _ in range(32)])
        >>> found = tuckaway.plan(model, "int8", max_memory={0: "400MB", "cpu": "1GB"}, reserve_bytes=0)
        >>> sorted({str(place) for place in found.device_map.values()}), found.on(0).peak_bytes <= 400_000_000
        (['0', 'cpu'], True)
    """
    request = _Request(
        find_source(model_or_config, revision=revision),
        device_map.device_map if isinstance(device_map, Plan) else device_map,
        max_memory,
        no_split_module_classes,
        as_dtype(dtype, "dtype"),
        batch_size,
        sequence_length,
        None if reserve_bytes is None else parse_bytes(reserve_bytes),
        slots,
        parse_bytes(disk_cache_bytes),
        offload_buffers,
        speeds or known_speeds(),
    )
    if fit:
        return _fitted(request, quantization_config)
    config, plain = _wanted(quantization_config, request.source)
    try:
        return request.made(config, plain)
    except PlanError as error:
        if error.shortfall_bytes is None:
            raise
        remedy = _remedy(request, config, plain, error)
        raise PlanError(
            error.what, where=error.where, hint=remedy, shortfall_bytes=error.shortfall_bytes
        ) from None


@dataclass(frozen=True)
class _Request:
    """Everything that was asked for, but the format."""

    source: Source
    device_map: Any
    max_memory: MaxMemory | None
    no_split_module_classes: Sequence[str] | str | None
    dtype: torch.dtype | None
    batch_size: int
    sequence_length: int
    reserve_bytes: int | None
    slots: int
    disk_cache_bytes: int
    offload_buffers: bool
    speeds: Speeds | None

    def made(self, config: QuantizationConfig | None, plain: torch.dtype | None) -> Plan:
        """Plan for one format."""
        model, dtype = self.source.model, plain or self.dtype
        wanted, _ = choose_specs(model, config, dtype=dtype, strict=False)
        specs = self.source.stored(wanted)
        whole = sorted(
            class_names(
                self.no_split_module_classes
                if self.no_split_module_classes is not None
                else getattr(model, "_no_split_modules", None)
            )
        )
        main = executing_device(self.device_map, self.max_memory)
        computed = plain or self.dtype or (None if config is None else config.plain_dtype)
        reserve = self._reserve(specs, computed, accelerator=main != "cpu")
        found = resolve_device_map(
            model,
            specs,
            self.device_map,
            max_memory=self.max_memory,
            no_split_module_classes=whole,
            offload_buffers=self.offload_buffers,
            slots=self.slots,
            disk_cache_bytes=self.disk_cache_bytes,
            reserve_bytes=reserve,
        )
        return self._plan(specs, found, whole, reserve, config, dtype)

    def _reserve(
        self, specs: Mapping[str, TensorSpec], dtype: torch.dtype | None, *, accelerator: bool
    ) -> int:
        if self.reserve_bytes is not None:
            return self.reserve_bytes
        estimate = estimate_reserve(
            self.source.model,
            specs,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            dtype=dtype or torch.float32,
            accelerator=accelerator,
        )
        return estimate.nbytes

    def _plan(
        self,
        specs: Mapping[str, TensorSpec],
        device_map: DeviceMap,
        whole: Sequence[str],
        reserve: int,
        config: QuantizationConfig | None,
        dtype: torch.dtype | None,
    ) -> Plan:
        model = self.source.model
        main = executing_device(self.device_map, self.max_memory, placement=device_map)
        ties = tied_groups(model)
        accounts = account(
            model,
            specs,
            device_map,
            main=main,
            no_split_module_classes=whole,
            offload_buffers=self.offload_buffers,
            slots=self.slots,
            disk_cache_bytes=self.disk_cache_bytes,
            reserve_bytes={main: reserve},
            ties=ties,
        )
        limits = budgets(self.max_memory)
        devices = [
            replace(memory, limit_bytes=limits.get(memory.device)) for memory in accounts.devices.values()
        ]
        devices.sort(key=lambda memory: (memory.device in OFFLOADED, str(memory.device)))
        result = Plan(
            self.source.name,
            None if config is None else config.to_dict(),
            None if dtype is None else str(dtype).removeprefix("torch."),
            dict(device_map),
            main,
            self.slots,
            accounts.pages.slot_nbytes,
            planned_blocks(model, specs, accounts, whole),
            tuple(devices),
            self.offload_buffers,
            tuple(whole),
            self.batch_size,
            self.sequence_length,
            tuple(tuple(group) for group in ties),
            self.source.checkpoint_bytes,
            self.speeds,
            self.disk_cache_bytes,
        )
        _check_fits(result)
        return result


def _check_fits(plan: Plan) -> None:
    """Refuse a map, given by hand, that does not fit."""
    for memory in plan.devices:
        limit = memory.limit_bytes
        needed = memory.counted_bytes
        if limit is not None and needed > limit:
            short = needed - limit
            raise PlanError(
                f"the model needs {format_bytes(needed)} of {_named(memory.device)}, {short} bytes more than "
                f"the {format_bytes(limit)} there are",
                hint=f"raise max_memory[{memory.device!r}] to {needed}, or place less there",
                shortfall_bytes=short,
            )


def _fitted(request: _Request, given: Any) -> Plan:
    """Return the best of all formats: the first that pages nothing, else the fastest."""
    base, _ = _wanted(given, request.source)
    best: tuple[float, Plan] | None = None
    error: PlanError | None = None
    for _, changes in _SMALLER:
        config = None if changes is None else (base or QuantizationConfig()).replace(**changes)
        plain = request.dtype or (base.plain_dtype if base is not None else None) or torch.bfloat16
        try:
            found = request.made(config, plain if config is None else None)
        except PlanError as failed:
            if failed.shortfall_bytes is None:
                raise
            error = failed
            continue
        if found.resident:
            return found
        expected = Expected.of(found.blocks, found.execution_device, None, request.speeds or TYPICAL)
        seconds = expected.transfer_seconds or 0.0
        if best is None or seconds < best[0]:
            best = (seconds, found)
    if best is not None:
        return best[1]
    assert error is not None
    raise PlanError(
        f"{error.what}, in the smallest format",
        where=error.where,
        hint=_remedy(request, QuantizationConfig(), None, error),
        shortfall_bytes=error.shortfall_bytes,
    )


def _remedy(
    request: _Request, config: QuantizationConfig | None, plain: torch.dtype | None, error: PlanError
) -> str:
    """Say what would make the model fit: each thing is tried."""
    found = []
    names = [name for name, _ in _SMALLER]
    at = 0 if config is None else names.index("int8") if config.format == "int8" else len(names) - 1
    for name, changes in _SMALLER[at + 1 :]:
        if _fits(request, (config or QuantizationConfig()).replace(**(changes or {})), None):
            found.append(f"{name} would fit")
            break
    shorter = max(request.sequence_length // 4, 1)
    if request.reserve_bytes is None and _fits(replace(request, sequence_length=shorter), config, plain):
        found.append(f"a length of {shorter} tokens would fit")
    limits = request.max_memory or {}
    for device in ("cpu", "disk"):
        if device in limits or (device == "cpu" and limits):
            more = {**limits, device: 2**62}
            if _fits(replace(request, max_memory=more), config, plain):
                found.append(f"more in max_memory[{device!r}] would fit")
    return "; ".join([*found, *filter(None, [error.hint])])


def _fits(request: _Request, config: QuantizationConfig | None, plain: torch.dtype | None) -> bool:
    try:
        request.made(config, plain)
    except PlanError:
        return False
    return True


def _wanted(given: Any, source: Source) -> tuple[QuantizationConfig | None, torch.dtype | None]:
    """Return the config and, where nothing is to be quantized, the dtype."""
    if given is None:
        return QuantizationConfig.of(source.own_config if source.own_config is not None else "nf4"), None
    if isinstance(given, torch.dtype) or (isinstance(given, str) and given not in registered_formats()):
        if given == "none":
            return None, None
        try:
            return None, as_dtype(given, "quantization_config")
        except ConfigError:
            if not isinstance(given, str):
                raise
    return QuantizationConfig.of(given), None


def _named(device: Device) -> str:
    return f"GPU {device}" if isinstance(device, int) else {"cpu": "RAM"}.get(device, device)
