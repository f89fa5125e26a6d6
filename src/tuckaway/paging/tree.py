"""What a device map says about each tensor of a model, and which modules are the size of a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from tuckaway.errors import PlanError, nearest_names
from tuckaway.tensor import TensorSpec

__all__ = ["ModuleTree", "Placement", "as_device", "home_of", "is_below", "is_called", "prefixes"]

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
Placement = int | str | torch.device


class ModuleTree:
    """A model's modules by path, and what a device map says about each tensor."""

    def __init__(
        self,
        model: nn.Module,
        specs: Mapping[str, TensorSpec],
        device_map: Mapping[str, Placement],
        whole: set[str],
        paged_homes: set[str],
    ) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.whole = whole
        self.paged_homes = paged_homes
        self.map = dict(device_map)
        self.entry_of: dict[str, str] = {}
        missing = []
        for name in specs:
            entry = next((path for path in prefixes(name) if path in self.map), None)
            if entry is None:
                missing.append(name)
            else:
                self.entry_of[name] = entry
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise PlanError(
                f"the device map leaves out {', '.join(map(repr, missing[:3]))}{more}",
                hint="add an entry for the module, or '' for everything else",
            )
        for entry in self.map:
            if entry not in self.modules and entry not in specs:
                raise PlanError(
                    f"the device map names {entry!r}, which is not in the model",
                    hint=nearest_names(entry, [*self.modules, *specs]) or None,
                )
        self.units: dict[str, str] = {}
        for entry, device in self.map.items():
            if entry in self.modules and home_of(device) in paged_homes:
                for path in self._units(entry):
                    self.units[path] = entry

    def home(self, name: str) -> str | None:
        """Where a tensor's page lives; None when it is resident."""
        home = home_of(self.map[self.entry_of[name]])
        return home if home in self.paged_homes else None

    def device(self, name: str, execution: torch.device) -> torch.device:
        """The device of a resident tensor."""
        return as_device(self.map[self.entry_of[name]], execution)

    def asker(self, name: str) -> str:
        """The module whose forward needs a tensor: its page's, or the one that holds it, if that is ever called."""
        entry = self.entry_of[name]
        holder = name.rpartition(".")[0]
        for path in prefixes(holder):
            if self.units.get(path) == entry:
                return self._called(path)
        return self._called(holder)

    def _called(self, path: str) -> str:
        return next((p for p in prefixes(path) if is_called(self.modules[p])), "")

    def _units(self, path: str) -> Iterator[str]:
        """Paths of the page-sized modules at and below ``path``."""
        module = self.modules[path]
        if self._is_unit(path, module):
            yield path
            return
        for child, _ in module.named_children():
            below = f"{path}.{child}" if path else child
            if below not in self.map:
                yield from self._units(below)

    def _is_unit(self, path: str, module: nn.Module) -> bool:
        if type(module).__name__ in self.whole or not any(True for _ in module.children()):
            return True
        if not is_called(module):
            return False
        is_list = isinstance(module, _LISTS)
        if path and isinstance(self.modules[path.rpartition(".")[0]], _LISTS):
            # a list in a list is descended into, but for a small one: Sequential(convolution, norm, activation)
            return not is_list or not any(True for child in module.children() for _ in child.children())
        if is_list:
            return False
        # a root is never one page, however small: all of it would have to fit at once
        return bool(path) and not any(isinstance(m, _LISTS) for m in module.modules())

    def moved(self, execution: torch.device, resident: Mapping[str, torch.device]) -> dict[str, torch.device]:
        """Devices that inputs must be moved to, when the map executes on more than one."""
        lies = {name: resident.get(name, execution) for name in self.entry_of}
        if all(device == execution for device in lies.values()):
            return {}
        moved: dict[str, torch.device] = {}
        for entry, placement in self.map.items():
            default = execution if home_of(placement) in self.paged_homes else as_device(placement, execution)
            for path in self._movers(entry) if entry in self.modules else ():
                found = {
                    lies[name] for name, of in self.entry_of.items() if of == entry and is_below(name, path)
                }
                if path and found:
                    # all tensors of a module can lie elsewhere only through a tie: then it executes there
                    moved[path] = found.pop() if len(found) == 1 else default
        return moved

    def _movers(self, path: str) -> Iterator[str]:
        """Modules of an entry that may be given inputs from another device: its own, or those among other entries."""
        if not any(is_below(other, path) for other in self.map if other != path and other in self.modules):
            yield from self._outermost_called(path)
            return
        if is_called(self.modules[path]):
            yield path
        for child, _ in self.modules[path].named_children():
            below = f"{path}.{child}" if path else child
            if below not in self.map:
                yield from self._movers(below)

    def _outermost_called(self, path: str) -> Iterator[str]:
        if is_called(self.modules[path]):
            yield path
            return
        for child, _ in self.modules[path].named_children():
            yield from self._outermost_called(f"{path}.{child}" if path else child)


def as_device(placement: Placement, execution: torch.device | None = None) -> torch.device:
    """Read a device as a map writes it, always with an index, so that devices compare equal.

    ``"disk"`` is where its pages are brought to.
    """
    if placement == "disk":
        return execution or torch.device("cpu")
    if isinstance(placement, int):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            raise PlanError(
                f"the device map asks for accelerator {placement}, and there is none", hint="use 'cpu'"
            )
        return torch.device(accelerator.type, placement)
    device = torch.device(placement)
    index: int | None = device.index
    if index is None and device.type not in ("cpu", "meta"):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is not None and accelerator.type == device.type:
            return torch.device(device.type, torch.accelerator.current_device_index())
        return torch.device(device.type, 0)
    return torch.device(device.type) if device.type == "cpu" else device


def is_called(module: nn.Module) -> bool:
    """Tell whether a module has a forward of its own (``ModuleList`` and ``ModuleDict`` have none)."""
    forward: object = type(module).forward
    unimplemented: object = nn.Module.forward
    return forward is not unimplemented or "forward" in module.__dict__


def home_of(placement: Placement) -> str:
    """Return ``"disk"`` or the kind of device that a map's value names; an accelerator's number for a number."""
    if isinstance(placement, int):
        return str(placement)
    return placement.split(":")[0] if isinstance(placement, str) else placement.type


def prefixes(name: str) -> Iterator[str]:
    """The name, then everything it lies in, ending with the root ``""``."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def is_below(path: str, above: str) -> bool:
    """Tell whether a dotted path lies in another; everything lies in the root ``""``."""
    return above == "" or path.startswith(f"{above}.")
