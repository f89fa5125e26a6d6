"""From whatever a user gives as ``device_map`` to a checked map in exact bytes: :func:`resolve_device_map`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from tuckaway.errors import PlanError, nearest_names
from tuckaway.paging.units import plan_pages
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
from tuckaway.plan.memory import Device, MaxMemory, get_max_memory
from tuckaway.plan.sizes import tensor_sizes
from tuckaway.plan.ties import ancestors, tied_groups
from tuckaway.tensor import TensorSpec

__all__ = ["resolve_device_map"]

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
    if device_map == "sequential":
        limits = get_max_memory(max_memory)
    else:
        limits = get_balanced_memory(
            model, max_memory, sorted(whole), low_zero=device_map == "balanced_low_0", specs=specs
        )
    # 0 bytes is how users say "not this one"; on the CPU of a machine without accelerators everything executes
    limits = {d: n for d, n in limits.items() if n > 0 or not isinstance(d, int)}
    tree = Tree(model, tensor_sizes(model, specs))
    pages = _Pages(model, specs, whole, offload_buffers, slots)
    return clean_device_map(_fullest(tree, limits, pages, whole).device_map)


def _fullest(tree: Tree, limits: Mapping[Device, int], pages: _Pages, whole: Collection[str]) -> Allocation:
    """Fill the devices in the model's order, or with its largest blocks first where that keeps more resident.

    Slots are as large as the largest page: one big block left to paging (the output head of a small model is 20
    times a layer) takes the room of many that could have stayed.
    """

    def keep(name: str, _: nn.Module) -> bool:
        return is_block(tree.model, name, whole)

    def fitted(first: Sequence[str]) -> Allocation:
        return fit(
            tree, limits, pages.overhead, lambda n, m: not keep(n, m), fallback=True, strict=True, first=first
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
    return best


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


class _Pages:
    """What paging takes beside the blocks that are placed: asked of paging itself, so that it is exact."""

    def __init__(
        self,
        model: nn.Module,
        specs: Mapping[str, TensorSpec],
        whole: Collection[str],
        offload_buffers: bool,
        slots: int,
    ) -> None:
        self.model = model
        self.specs = specs
        self.whole = sorted(whole)
        self.offload_buffers = offload_buffers
        self.slots = slots
        self.ties = tied_groups(model)

    def overhead(self, device_map: Mapping[str, Device], main: Device) -> dict[Device, int]:
        """Return, by device, bytes of slots, buffers that stay, and the padding of pages."""
        if all(place not in OFFLOADED for place in device_map.values()):
            return {}
        # accelerators need not exist to be planned for: any device but the CPU does
        executes = torch.device("cpu" if main == "cpu" else "meta")
        stand_in = {n: place if place in OFFLOADED else executes for n, place in device_map.items()}
        plan = plan_pages(
            self.model,
            self.specs,
            stand_in,
            execution_device=executes,
            no_split_module_classes=self.whole,
            offload_buffers=self.offload_buffers,
            ties=self.ties,
        )
        if not plan.pages:
            return {}
        away = ("disk",) if main == "cpu" else OFFLOADED
        stay = sum(
            self.specs[name].nbytes
            for name, kept in plan.canonical.items()
            if name == kept and name in plan.resident and place_of(name, device_map) in away
        )
        exact = {
            home: sum(self.specs[name].nbytes for page in plan.homed(home) for name in page.tensors)
            for home in OFFLOADED
        }
        found: dict[Device, int] = {main: plan.device_nbytes(self.slots) + stay}
        found["cpu"] = found.get("cpu", 0) + plan.arena_nbytes - exact["cpu"]
        found["disk"] = plan.store_nbytes - exact["disk"]
        return found
