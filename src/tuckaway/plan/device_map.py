"""Device maps: inferred from memory, checked against a model, read as users write them.

A device map says where each module or tensor lies: an accelerator's index, ``"cpu"`` or ``"disk"``, by dotted name;
the longest name that a tensor lies in counts, and ``""`` is the whole model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tuckaway.errors import PlanError, nearest_names
from tuckaway.plan.allocate import Allocation, Tree, allocate
from tuckaway.plan.memory import Device, MaxMemory, format_bytes, get_max_memory
from tuckaway.plan.sizes import tensor_sizes
from tuckaway.plan.ties import ancestors, named_tensors
from tuckaway.tensor import TensorSpec

__all__ = [
    "DeviceMap",
    "Placement",
    "check_device_map",
    "check_devices",
    "clean_device_map",
    "fit",
    "infer_auto_device_map",
    "main_device_of",
    "normalized",
    "place_of",
]

_log = logging.getLogger("tuckaway")

Placement = int | str | torch.device
DeviceMap = dict[str, Device]

OFFLOADED = ("cpu", "disk")


def infer_auto_device_map(
    model: nn.Module,
    max_memory: MaxMemory | None = None,
    no_split_module_classes: Sequence[str] | str | None = None,
    dtype: Any = None,
    special_dtypes: Mapping[str, Any] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
    *,
    specs: Mapping[str, TensorSpec] | None = None,
) -> DeviceMap:
    """Fill the accelerators, then RAM, then the disk, with a model's modules in their order.

    When something is offloaded, the first accelerator keeps room for the largest offloaded layer and for the buffers
    that stay there, and RAM keeps room for the largest layer on disk; when everything fits, nothing is kept free.

    Args:
        model: its tensors may be on the meta device.
        max_memory: bytes by device, ``{0: "10GB", "cpu": "30GB"}``; ``None``: what is free.
        no_split_module_classes: class names of modules that must lie on one device.
        dtype: dtype that wider float tensors will have.
        special_dtypes: dtypes of single tensors, by name.
        verbose: log every decision (at level INFO).
        clean_result: write a module once where all of it is on one device.
        offload_buffers: buffers of offloaded modules are offloaded too.
        fallback_allocation: a device too small for the next module takes a later, smaller one.
        specs: final forms of the tensors (:func:`~tuckaway.plan.choose_specs`): exact sizes of quantized weights.

    Raises:
        PlanError: a budget nobody can read, or a limit for the disk that does not suffice.

    Example:
        >>> model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
        >>> infer_auto_device_map(model, {0: 900})
        {'': 0}
        >>> infer_auto_device_map(model, {0: 880, "cpu": 440 * 2})
        {'': 0}
        >>> infer_auto_device_map(model, {"cpu": 879})
        {'': 'disk'}
    """
    whole = class_names(no_split_module_classes)
    sizes = tensor_sizes(model, specs, dtype=dtype, special_dtypes=special_dtypes)
    tree = Tree(model, sizes)

    def is_layer(name: str, module: nn.Module) -> bool:
        return type(module).__name__ in whole or not any(True for _ in module.children())

    layers = [(node.name, tree.bytes_of(node.tensors)) for node in tree.leaves("", is_layer)]
    buffers = {} if offload_buffers else {name: sizes[name] for name, _ in model.named_buffers()}

    def overhead(device_map: Mapping[str, Device], main: Device) -> dict[Device, int]:
        def largest(*places: Device) -> int:
            return max((size for name, size in layers if place_of(name, device_map) in places), default=0)

        away: tuple[Device, ...] = ("disk",) if main == "cpu" else OFFLOADED
        stay = sum(size for name, size in buffers.items() if place_of(name, device_map) in away)
        return {"cpu": largest("disk"), main: largest(*away) + stay}

    limits = get_max_memory(max_memory)
    found = fit(
        tree,
        limits,
        overhead,
        lambda name, module: not is_layer(name, module),
        fallback=fallback_allocation,
        strict=False,
        say=(lambda message: _log.info("%s", message)) if verbose else None,
    )
    for device, need in found.refused.items():
        _log.info("nothing was placed on %s: its first candidate needs %s", device, format_bytes(need))
    return clean_device_map(found.device_map) if clean_result else found.device_map


def fit(
    tree: Tree,
    limits: Mapping[Device, int],
    overhead: Callable[[Mapping[str, Device], Device], Mapping[Device, int]],
    may_split: Callable[[str, nn.Module], bool],
    *,
    fallback: bool,
    strict: bool,
    first: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
) -> Allocation:
    """Allocate so that each device holds its blocks and the overhead that the offloaded ones cause.

    The overhead depends on what is offloaded, and what is offloaded on the overhead: begin with none, keep free what
    the result turned out to need, and allocate again. What is kept free only grows, so this ends.

    Args:
        tree: the model.
        limits: bytes by device.
        overhead: of a map and its main device, the bytes each device needs beside the blocks placed there.
        may_split: whether a module may be split.
        fallback: as in :func:`allocate`.
        strict: overhead that does not fit even on an otherwise empty device is an error, not only unavoidable.
        first: as in :func:`allocate`.
        say: told of every decision.

    Raises:
        PlanError: something fits nowhere; says by how many bytes.
    """
    devices = [*limits] if "disk" in limits else [*limits, "disk"]
    main = devices[0] if devices[0] != "disk" else "cpu"
    kept = dict.fromkeys(limits, 0)
    while True:
        room = {device: limit - kept[device] for device, limit in limits.items()}
        found = allocate(tree, devices, room, may_split, fallback=fallback, first=first, say=say)
        if found.left:
            short = sum(tree.bytes_of(tree.below(name)) for name in found.left)
            last = devices[-1]
            raise PlanError(
                f"{format_bytes(short)} ({short} bytes) of the model fit nowhere",
                where=f"first: {found.left[0]}",
                hint=f"raise max_memory[{last!r}] by as much, or use a smaller format",
                shortfall_bytes=short,
            )
        needed = overhead(found.device_map, main)
        over = {d: found.used[d] + needed.get(d, 0) - limits[d] for d in limits}
        grew = {d: needed.get(d, 0) for d in limits if over[d] > 0 and needed.get(d, 0) > kept[d]}
        if not grew:
            stuck = {d: n for d, n in over.items() if n > 0}
            if stuck and strict:
                device, short = next(iter(stuck.items()))
                enough = found.used[device] + needed[device]
                raise PlanError(
                    f"{describe(device)} must hold {format_bytes(enough)}, {short} bytes more than "
                    f"max_memory allows",
                    hint=f"raise max_memory[{device!r}] to {enough}, or use a smaller format",
                    shortfall_bytes=short,
                )
            return found
        kept.update(grew)


def check_device_map(model: nn.Module, device_map: Mapping[str, Placement]) -> None:
    """Check that a map covers every tensor of the model's state and names nothing else.

    Buffers that are not part of the state (``persistent=False``) may be left out.

    Raises:
        PlanError: a name that is not in the model, or tensors without a device.
    """
    tensors = dict(named_tensors(model))
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in device_map:
        if name not in modules and name not in tensors:
            raise PlanError(
                f"the device map names {name!r}, which is not in the model",
                hint=nearest_names(name, [*modules, *tensors]) or None,
            )
    optional = transient_buffers(model)
    missing = [
        n for n in tensors if n not in optional and all(path not in device_map for path in ancestors(n))
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise PlanError(
            f"the device map leaves out {', '.join(map(repr, missing[:3]))}{more}",
            hint="add an entry for the module, or '' for everything else",
        )


def clean_device_map(device_map: dict[str, Any], module_name: str = "") -> dict[str, Any]:
    """Write a module once where everything below it has one device. Changes the map, and returns it.

    Args:
        device_map: a complete map.
        module_name: the module to begin with.

    Example:
        >>> clean_device_map({"a.b": 0, "a.c": 0, "d": 1})
        {'d': 1, 'a': 0}
    """
    prefix = f"{module_name}." if module_name else ""
    below = [name for name in device_map if name.startswith(prefix) and name != module_name]
    if not below:
        return device_map
    own = [device_map[path] for path in ancestors(module_name) if path in device_map][:1]
    places = {device_map[name] for name in below}
    # an entry above stands for what is not listed here: what is below may differ from it, and then must stay
    if len(places) == 1 and (own == list(places) or (not own and len(below) > 1)):
        place = places.pop()
        for name in below:
            del device_map[name]
        if not own:
            device_map[module_name] = place
        return device_map
    for child in dict.fromkeys(prefix + name[len(prefix) :].partition(".")[0] for name in below):
        clean_device_map(device_map, child)
    return device_map


def check_devices(device_map: Mapping[str, Placement]) -> None:
    """Check that this machine has the accelerators that a map names.

    Raises:
        PlanError: it lacks one.
    """
    present = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    for name, place in device_map.items():
        device = normalized(place)
        if isinstance(device, int) and device >= present:
            raise PlanError(
                f"accelerator {device} does not exist; this machine has {present}",
                where=f"device map, {name!r}",
                hint="place it on 'cpu' or 'disk'" if not present else f"use 0 to {present - 1}",
            )


def normalized(place: Placement) -> Device:
    """Return a place as a map holds it: an accelerator's index, ``"mps"``, ``"cpu"`` or ``"disk"``.

    Raises:
        PlanError: it is none of these.

    Example:
        >>> normalized(torch.device("cuda", 1)), normalized("cpu"), normalized("disk")
        (1, 'cpu', 'disk')
    """
    if place in ("disk", "cpu", "mps"):
        return str(place)
    if isinstance(place, int) and not isinstance(place, bool) and place >= 0:
        return place
    device = _read_device(place)
    if device.type in ("cpu", "mps"):
        return device.type
    if device.type == "meta":
        raise PlanError("nothing can be placed on the meta device", where="device map", hint="use 'disk'")
    if device.index is not None:
        return device.index
    return torch.accelerator.current_device_index() if torch.accelerator.is_available() else 0


def _read_device(place: object) -> torch.device:
    try:
        if isinstance(place, str | torch.device):
            return torch.device(place)
    except RuntimeError:
        pass  # torch's message would be about its own list of devices, which lacks "disk"
    raise PlanError(f"{place!r} is no device", where="device map", hint="use a GPU's number, 'cpu' or 'disk'")


def place_of(name: str, device_map: Mapping[str, Any]) -> Any:
    """Return the device of a module or tensor: the longest entry it lies in.

    Raises:
        PlanError: no entry covers it.
    """
    for path in ancestors(name):
        if path in device_map:
            return device_map[path]
    raise PlanError(f"the device map leaves out {name!r}")


def main_device_of(device_map: Mapping[str, Placement], main_device: Placement | None = None) -> torch.device:
    """Return the device that executes: the one given, the map's first accelerator, or the CPU.

    Raises:
        PlanError: the device given cannot execute.
    """
    if main_device is not None:
        chosen = normalized(main_device)
        if chosen == "disk":
            raise PlanError("'disk' cannot execute", where="main_device", hint="use a GPU's number or 'cpu'")
    else:
        places = (normalized(place) for place in device_map.values())
        chosen = next((place for place in places if place not in OFFLOADED), "cpu")
    if isinstance(chosen, str):
        return torch.device(chosen)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cuda" if accelerator is None else accelerator.type, chosen)


def transient_buffers(model: nn.Module) -> set[str]:
    """Return the names of buffers that are not part of the state."""
    names = set()
    for path, module in model.named_modules(remove_duplicate=False):
        names |= {f"{path}.{name}" if path else name for name in module._non_persistent_buffers_set}
    return names


def class_names(classes: Sequence[str] | str | None) -> Collection[str]:
    """Return a set of class names, however they were given."""
    return {classes} if isinstance(classes, str) else set(classes or ())


def describe(device: Device) -> str:
    """Write a device for people."""
    return f"GPU {device}" if isinstance(device, int) else device
