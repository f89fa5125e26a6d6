"""Bytes by device of a placed model, before it exists: :func:`account`.

Whoever needs a number of these (the planner, the search for a map, the loader's check of a plan, the demo's budget)
asks here; nobody else adds up weights, slots, the ring and what loading takes. Pages, slots and paddings are asked of
paging itself, so that the numbers are those that are allocated at run time. On an accelerator what torch's allocator
adds (:mod:`tuckaway.plan.allocator`) is counted as padding.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from tuckaway.checkpoint import PIECE_BYTES, Ring
from tuckaway.paging.homes import kept_pages
from tuckaway.paging.transfer import bounce_nbytes
from tuckaway.paging.units import PagePlan, plan_pages
from tuckaway.plan.allocator import UNSPLIT, large_bytes, rounding_bytes, slack_bytes
from tuckaway.plan.device_map import OFFLOADED, main_device_of, normalized
from tuckaway.plan.memory import Device
from tuckaway.tensor import TensorSpec

__all__ = ["Accounts", "DeviceMemory", "account", "host_ring_bytes", "load_work_bytes"]

_PIECES = {False: 2, True: 4}
"""Pieces on the device at once: as read and as cast; to be quantized, also codes, scales and strips in fp32."""


@dataclass(frozen=True)
class DeviceMemory:
    """What one device holds; all in bytes.

    Args:
        device: an accelerator's index, ``"mps"``, ``"cpu"`` or ``"disk"``.
        weights_bytes: tensors that lie here, resident or in pages, without padding; tied ones once.
        padding_bytes: what alignment adds: of pages, and of the allocator.
        slots_bytes: places that pages take turns in.
        cache_bytes: pages on disk that stay in RAM once they were read.
        buffers_bytes: pinned buffers that pages from disk pass through.
        loading_bytes: pieces of the checkpoint and work on them, until the model is loaded.
        reserve_bytes: kept free for activations and the KV cache.
        limit_bytes: what the device may take; ``None``: without limit.
    """

    device: Device
    weights_bytes: int = 0
    padding_bytes: int = 0
    slots_bytes: int = 0
    cache_bytes: int = 0
    buffers_bytes: int = 0
    loading_bytes: int = 0
    reserve_bytes: int = 0
    limit_bytes: int | None = None

    @property
    def in_use_bytes(self) -> int:
        """What is allocated for good once the model has run."""
        return self.weights_bytes + self.padding_bytes + self._turning_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that is allocated at once: slots come when the load's pieces are gone."""
        running = self._turning_bytes + self.reserve_bytes
        return self.weights_bytes + self.padding_bytes + max(self.loading_bytes, running)

    @property
    def counted_bytes(self) -> int:
        """What is held against the limit: the peak; in RAM without the pieces of files that pass through.

        Those take at most 256 MiB whatever the model, and a limit there is for what weights take.
        """
        if self.device == "cpu":
            return self.in_use_bytes - self.buffers_bytes + self.reserve_bytes
        return self.peak_bytes

    @property
    def _turning_bytes(self) -> int:
        return self.slots_bytes + self.cache_bytes + self.buffers_bytes

    @property
    def free_bytes(self) -> int | None:
        """What the limit leaves; negative when it does not suffice."""
        return None if self.limit_bytes is None else self.limit_bytes - self.counted_bytes


@dataclass(frozen=True)
class Accounts:
    """Pages of a placed model, and bytes by device.

    Args:
        pages: paging's own plan.
        devices: every device that holds something.
        places: device of every tensor, by the name its bytes are kept under.
    """

    pages: PagePlan
    devices: Mapping[Device, DeviceMemory]
    places: Mapping[str, Device]

    @property
    def least_memory(self) -> dict[Device, int]:
        """The smallest ``max_memory`` under which the model can be placed so, the reserve included; none for disk."""
        return {d: memory.counted_bytes for d, memory in self.devices.items() if d != "disk"}


def account(
    model: nn.Module,
    specs: Mapping[str, TensorSpec],
    device_map: Mapping[str, Device],
    *,
    main: Device | None = None,
    no_split_module_classes: Sequence[str] = (),
    offload_buffers: bool = False,
    slots: int = 2,
    disk_cache_bytes: int = 0,
    reserve_bytes: Mapping[Device, int] | None = None,
    ties: Iterable[Sequence[str]] | None = None,
) -> Accounts:
    """Count the bytes of a model that is placed as ``device_map`` says; nothing is allocated.

    Args:
        model: its tensors may be on the meta device.
        specs: final form of every tensor.
        device_map: complete; accelerators need not exist.
        main: device that executes; ``None``: the map's first accelerator, or the CPU.
        no_split_module_classes: class names of modules that are paged whole.
        offload_buffers: buffers of offloaded modules are paged too.
        slots: pages on the executing device at once.
        disk_cache_bytes: RAM that pages on disk may stay in.
        reserve_bytes: kept free, by device.
        ties: groups of names that are one tensor; ``None``: those that are one object.

    Raises:
        PlanError: the map leaves a tensor out, or names nothing in the model.

    Example:
        >>> from tuckaway.plan import choose_specs
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        >>> specs, _ = choose_specs(model, None)
        >>> found = account(model, specs, {"0": 0, "1": "disk"})
        >>> found.devices[0].weights_bytes, found.devices[0].slots_bytes, found.devices["disk"].padding_bytes
        (16640, 17152, 3840)
    """
    executes = _stand_in(normalized(main_device_of(device_map)) if main is None else main)
    pages = plan_pages(
        model,
        specs,
        {name: place if place in OFFLOADED else _stand_in(place) for name, place in device_map.items()},
        execution_device=executes,
        no_split_module_classes=no_split_module_classes,
        offload_buffers=offload_buffers,
        ties=ties,
    )
    chosen = _device(executes)
    places = {
        name: page.home if (page := pages.page_of(name)) is not None else _device(pages.resident[name])
        for name, kept in pages.canonical.items()
        if name == kept
    }
    weights: dict[Device, int] = defaultdict(int)
    padding: dict[Device, int] = defaultdict(int)
    cut: set[Device] = set()
    for name, place in places.items():
        weights[place] += specs[name].nbytes
        if place not in OFFLOADED:
            padding[place] += rounding_bytes(specs[name])
            if large_bytes(specs[name]):
                cut.add(place)
    for place in cut:
        padding[place] += UNSPLIT  # the last tensor that is cut out of the one block may get its rest
    for page in pages.pages:
        padding[page.home] += page.layout.extent - sum(specs[name].nbytes for name in page.tensors)
    loading = load_work_bytes(specs, [name for name, place in places.items() if place in OFFLOADED])
    reserve = reserve_bytes or {}
    found = {
        device: DeviceMemory(
            device,
            weights[device],
            padding[device],
            loading_bytes=loading if device not in OFFLOADED else 0,
            reserve_bytes=reserve.get(device, 0),
        )
        for device in dict.fromkeys([chosen, *places.values(), *reserve])
    }
    turns = pages.device_allocations(slots)
    if chosen not in OFFLOADED:
        turns = [nbytes + slack_bytes(nbytes) for nbytes in turns]
    found[chosen] = replace(found[chosen], slots_bytes=sum(turns))
    cached = kept_pages(pages.homed("disk"), disk_cache_bytes)
    found["cpu"] = replace(
        found.get("cpu", DeviceMemory("cpu")),
        cache_bytes=sum(page.layout.extent for page in cached),
        buffers_bytes=bounce_nbytes() if chosen != "cpu" and pages.homed("disk") else 0,
        loading_bytes=host_ring_bytes(chosen),
    )
    return Accounts(pages, found, places)


def host_ring_bytes(main: Device) -> int:
    """Bytes of RAM that a checkpoint passes through on its way to ``main``: at most, and only while loading."""
    return Ring.towards(_stand_in(main)).count * PIECE_BYTES


def load_work_bytes(specs: Mapping[str, TensorSpec], paged: Iterable[str] = ()) -> int:
    """Return the bytes on an accelerator beside the weights while a checkpoint is loaded, at most.

    A checkpoint may hold 4 bytes an element. What is stored transposed comes whole, and so does a paged tensor: it
    is made on the device and then goes to its page.

    Args:
        specs: final form of every tensor.
        paged: names of those that do not stay on the accelerator.
    """
    most, away = 0, set(paged)
    for name, spec in specs.items():
        source = 4 * math.prod(spec.shape)
        transposed = spec.layout is not None and spec.layout.transposed
        pieces = _PIECES[spec.layout is not None] * min(source, PIECE_BYTES)
        whole = source if transposed and source > PIECE_BYTES else 0
        parts = spec.components()
        # nested scales are quantized when the last one is there: in fp32 until then
        scales = 4 * math.prod(parts["absmax"][0]) if "nested_absmax" in parts else 0
        most = max(most, pieces + whole + scales + (spec.nbytes if name in away else 0))
    return most


def _stand_in(place: Device) -> torch.device:
    """A device by which paging knows a place; accelerators need not exist to be planned for."""
    if isinstance(place, int):
        present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cuda" if present is None else present.type, place)
    return torch.device(place, 0) if place == "mps" else torch.device(place)


def _device(device: torch.device) -> Device:
    return device.type if device.type in ("cpu", "mps") else device.index
