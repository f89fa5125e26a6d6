"""From whatever a user gives as ``device_map`` to a checked map in exact bytes: :func:`resolve_device_map`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from tuckaway.errors import PlanError, nearest_names
from tuckaway.plan.accounts import account, host_ring_bytes
from tuckaway.plan.allocate import Allocation, Tree, is_block
from tuckaway.plan.balance import get_balanced_memory
from tuckaway.plan.device_map import (
    OFFLOADED,
    DeviceMap,
    Placement,
    check_device_map,
    class_names,
    clean_device_map,
    fit,
    main_device_of,
    normalized,
    place_of,
    transient_buffers,
)
from tuckaway.plan.memory import Device, MaxMemory, budgets
from tuckaway.plan.sizes import tensor_sizes
from tuckaway.plan.ties import ancestors, tied_groups
from tuckaway.tensor import TensorSpec

__all__ = ["executing_device", "resolve_device_map"]

_TRIED = 4
"""Sizes of blocks that are tried as the least of those that stay: embedding, head, and what else is not a layer."""

_NAMED = ("auto", "balanced", "balanced_low_0", "sequential")


def resolve_device_map(
    model: nn.Module,
    specs: Mapping[str, TensorSpec],
    device_map: Mapping[str, Placement] | Placement | None,
    *,
    max_memory: MaxMemory | None = None,
    no_split_module_classes: Sequence[str] | str | None = None,
    offload_buffers: bool = False,
    slots: int = 2,
    disk_cache_bytes: int = 0,
    reserve_bytes: int | None = None,
) -> DeviceMap:
    """Return a complete map: names to an accelerator's index, ``"cpu"`` or ``"disk"``.

    Args:
        model: its structure.
        specs: final form of every tensor.
        device_map: ``None``: everything on the current accelerator, or on the CPU where there is none. ``"auto"``
            (= ``"balanced"``), ``"balanced_low_0"``, ``"sequential"``: fill the devices of ``max_memory``. A device:
            everything there. A dict: checked.
        max_memory: bytes by device, for the named maps; ``None``: what is free.
        no_split_module_classes: class names of modules that must lie on one device. ``None``: what a transformers
            model names itself. Elements of module lists are never split.
        offload_buffers: buffers of offloaded modules are paged too.
        slots: pages that the executing device holds at once.
        disk_cache_bytes: RAM that pages on disk may stay in.
        reserve_bytes: what the named maps leave free, beside slots and the load's work, on every accelerator, or in
            RAM where there is none. ``None``: a tenth of what an accelerator has free; nothing under ``max_memory``.

    Raises:
        PlanError: a map that cannot be; a model that does not fit, and by how many bytes.

    Example:
        >>> from tuckaway.plan import choose_specs
        >>> model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
        >>> specs, _ = choose_specs(model, None)
        >>> resolve_device_map(model, specs, "auto", max_memory={"cpu": "51kB"})
        {'0': 'cpu', '1': 'disk', '2': 'disk', '3': 'disk'}
    """
    if isinstance(device_map, Mapping):
        return _completed(model, {name: normalized(place) for name, place in device_map.items()})
    if device_map is None:
        available = torch.accelerator.is_available()
        return {"": torch.accelerator.current_device_index() if available else "cpu"}
    if device_map not in _NAMED:
        if isinstance(device_map, str) and device_map not in ("cpu", "disk", "mps") and ":" not in device_map:
            near = nearest_names(device_map, [*_NAMED, "cpu", "disk"])
            if near:
                raise PlanError(f"{device_map!r} is no device map", hint=near)
        return {"": normalized(device_map)}
    whole = class_names(
        no_split_module_classes
        if no_split_module_classes is not None
        else getattr(model, "_no_split_modules", None)
    )
    limits, reserve = _budgets(max_memory, reserve_bytes)
    limits = _without_empty(limits)
    overhead = _Overhead(model, specs, whole, offload_buffers, slots, disk_cache_bytes, reserve)
    if device_map != "sequential":
        limits = _balanced(model, specs, limits, whole, overhead, low_zero=device_map == "balanced_low_0")
        limits = _without_empty(limits)  # one that is to stay empty needs no reserve either
    tree = Tree(model, tensor_sizes(model, specs))
    return clean_device_map(_fullest(tree, limits, overhead, whole).device_map)


def executing_device(
    device_map: Mapping[str, Placement] | Placement | None,
    max_memory: MaxMemory | None = None,
    *,
    placement: Mapping[str, Placement] | None = None,
) -> Device:
    """Return what executes under a map: its first accelerator; of a named map, the first that has a budget.

    Without one, the CPU. A GPU executes even where nothing stays on it and all blocks are paged to it.

    Args:
        device_map: as it was asked for.
        max_memory: bytes by device.
        placement: what became of it, once that is known: the first accelerator that holds something executes.
    """
    if placement is not None and any(normalized(place) not in OFFLOADED for place in placement.values()):
        return normalized(main_device_of(placement))
    if isinstance(device_map, Mapping):
        return normalized(main_device_of(device_map))
    if device_map is None:
        return torch.accelerator.current_device_index() if torch.accelerator.is_available() else "cpu"
    if device_map not in _NAMED:
        return normalized(main_device_of({"": device_map}))
    limits = budgets(max_memory)
    return next((d for d, size in limits.items() if d not in OFFLOADED and size > 0), "cpu")


def _budgets(
    max_memory: MaxMemory | None, reserve_bytes: int | None
) -> tuple[dict[Device, int], dict[Device, int]]:
    """Return what each device may take, and what of that stays free."""
    limits = budgets(max_memory)
    accelerators = [device for device in limits if device not in OFFLOADED]
    if max_memory is None and "cpu" in limits:
        ring = host_ring_bytes(accelerators[0] if accelerators else "cpu")
        limits["cpu"] = max(0, limits["cpu"] - ring)
    if reserve_bytes is not None:
        return limits, dict.fromkeys(accelerators or ["cpu"], reserve_bytes)
    if max_memory is None:
        return limits, {device: limits[device] // 10 for device in accelerators}
    return limits, {}


def _without_empty(limits: dict[Device, int]) -> dict[Device, int]:
    """Leave out the accelerators that may take 0 bytes, which is how users, and balancing, say "not this one"."""
    return {device: size for device, size in limits.items() if size > 0 or not isinstance(device, int)}


def _balanced(
    model: nn.Module,
    specs: Mapping[str, TensorSpec],
    limits: dict[Device, int],
    whole: Collection[str],
    overhead: _Overhead,
    *,
    low_zero: bool,
) -> dict[Device, int]:
    """Lower the limits to even shares, each with what its accelerator needs beside its blocks."""
    accelerators = [device for device in limits if isinstance(device, int)]
    if len(accelerators) < 2:
        return limits
    shares = get_balanced_memory(model, limits, sorted(whole), low_zero=low_zero, specs=specs)
    beside = overhead.of({"": accelerators[0]}, accelerators[0])[accelerators[0]]
    return {
        device: min(limits[device], share + beside) if isinstance(device, int) and share else share
        for device, share in shares.items()
    }


def _fullest(
    tree: Tree, limits: Mapping[Device, int], overhead: _Overhead, whole: Collection[str]
) -> Allocation:
    """Fill the devices in the model's order, or with its largest blocks first where that keeps more resident.

    Slots are as large as the largest page: one big block left to paging (the output head of a small model is 20
    times a layer) takes the room of many that could have stayed.
    """

    def keep(name: str, _: nn.Module) -> bool:
        return is_block(tree.model, name, whole)

    def fitted(first: Sequence[str]) -> Allocation:
        return fit(
            tree, limits, overhead.of, lambda n, m: not keep(n, m), fallback=True, strict=True, first=first
        )

    error: PlanError | None = None
    best: Allocation | None = None
    try:
        best = fitted(())
        if all(place not in OFFLOADED for place in best.device_map.values()):
            return best
    except PlanError as failed:
        error = failed
    blocks = {node.name: tree.bytes_of(node.tensors) for node in tree.leaves("", keep)}
    executing = [device for device in limits if device not in OFFLOADED] or ["cpu"]
    if len(executing) == 1 and executing[0] in limits:
        for least in sorted(set(blocks.values()), reverse=True)[:_TRIED]:
            try:
                other = fitted([name for name, size in blocks.items() if size >= least])
            except PlanError:
                continue
            if best is None or other.used[executing[0]] > best.used[executing[0]]:
                best = other
    if best is None:
        raise error or PlanError("the model fits nowhere")
    if len(executing) == 1:
        for device in dict.fromkeys([executing[0], "cpu"]):
            if device in limits:
                _top_up(best, tree, limits, overhead, device, executing[0])
    return best


def _top_up(
    found: Allocation,
    tree: Tree,
    limits: Mapping[Device, int],
    overhead: _Overhead,
    device: Device,
    main: Device,
) -> None:
    """Bring to ``device`` what still fits there from slower places, the largest first: it saves its transfer."""
    slower = OFFLOADED if device == main != "cpu" else ("disk",)
    away = {n: tree.bytes_of(tree.below(n)) for n, place in found.device_map.items() if place in slower}
    refused: int | None = None
    for name, size in sorted(away.items(), key=lambda item: -item[1]):
        if size == 0 or (refused is not None and size >= refused):
            continue
        if found.used[device] + size > limits[device] or not tree.tied.isdisjoint(tree.below(name)):
            continue
        before = found.device_map[name]
        found.device_map[name] = device
        needed = overhead.of(found.device_map, main)
        used = {**found.used, device: found.used[device] + size, before: found.used[before] - size}
        if any(used[d] + needed.get(d, 0) > limit for d, limit in limits.items()):
            found.device_map[name] = before
            refused = size
            continue
        found.used.update(used)


def _completed(model: nn.Module, device_map: DeviceMap) -> DeviceMap:
    """Check a map; buffers that are not part of the state and that it leaves out go where the model executes."""
    check_device_map(model, device_map)
    left = [
        n for n in sorted(transient_buffers(model)) if all(path not in device_map for path in ancestors(n))
    ]
    if left:
        main = normalized(main_device_of(device_map))
        device_map |= dict.fromkeys(left, main)
    return device_map


class _Overhead:
    """What a placed model takes beside its blocks: slots, buffers that stay, paddings, the load's work, the reserve."""

    def __init__(
        self,
        model: nn.Module,
        specs: Mapping[str, TensorSpec],
        whole: Collection[str],
        offload_buffers: bool,
        slots: int,
        disk_cache_bytes: int,
        reserve: Mapping[Device, int],
    ) -> None:
        self.model = model
        self.specs = specs
        self.whole = sorted(whole)
        self.offload_buffers = offload_buffers
        self.slots = slots
        self.disk_cache_bytes = disk_cache_bytes
        self.reserve = reserve
        self.ties = tied_groups(model)

    def of(self, device_map: Mapping[str, Device], main: Device) -> dict[Device, int]:
        """Return, by device, the bytes held against its limit less those of the blocks placed there."""
        # as it will be: modules whose parts were placed one by one, alike, are a page again
        device_map = clean_device_map(dict(device_map))
        # what executes is the first accelerator that holds something; slots on another would not be used
        holding = (place for place in device_map.values() if place not in OFFLOADED)
        accounts = account(
            self.model,
            self.specs,
            device_map,
            main=next(holding, main),
            no_split_module_classes=self.whole,
            offload_buffers=self.offload_buffers,
            slots=self.slots,
            disk_cache_bytes=self.disk_cache_bytes,
            reserve_bytes=self.reserve,
            ties=self.ties,
        )
        placed: dict[Device, int] = defaultdict(int)
        for name in accounts.places:
            placed[place_of(name, device_map)] += self.specs[name].nbytes
        return {device: memory.counted_bytes - placed[device] for device, memory in accounts.devices.items()}
