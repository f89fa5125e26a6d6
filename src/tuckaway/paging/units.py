"""From a device map to pages: which tensors share a page, and whose forward brings it in.

A page is what is used together: a decoder layer, an embedding, the tensors a module holds beside its children.
:func:`plan_pages` decides that from the model's structure alone; nothing is allocated and the model is not changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import nn

from tuckaway.paging.page import PageLayout
from tuckaway.paging.tree import ModuleTree, Placement, as_device, prefixes
from tuckaway.tensor import TensorSpec

__all__ = ["PagePlan", "PageUnit", "as_device", "plan_pages"]


@dataclass(frozen=True)
class PageUnit:
    """One page to be.

    Args:
        index: its place in the model's order.
        name: path of the module it belongs to, for messages.
        home: ``"cpu"`` or ``"disk"``.
        tensors: names of the tensors it holds; of a tied tensor, the name it is kept under.
        layout: where their bytes lie.
        askers: paths of the modules whose forward needs it.
        outer: needed while other pages take their turns, so it gets a place of its own instead of a slot.
    """

    index: int
    name: str
    home: str
    tensors: tuple[str, ...]
    layout: PageLayout
    askers: tuple[str, ...]
    outer: bool = False


@dataclass(frozen=True)
class PagePlan:
    """What is paged, from where, and what is not.

    Args:
        pages: in the model's order.
        execution_device: where pages are brought to.
        resident: device of every tensor that is not paged, by each of its names.
        canonical: the name that a tensor's bytes are kept under, by each of its names.
        specs: final form of every tensor, by each of its names.
        moved: devices that the inputs of other modules are moved to, by path; empty when all executes on one.
    """

    pages: tuple[PageUnit, ...]
    execution_device: torch.device
    resident: Mapping[str, torch.device]
    canonical: Mapping[str, str]
    specs: Mapping[str, TensorSpec]
    moved: Mapping[str, torch.device] = field(default_factory=dict)

    def __post_init__(self) -> None:
        of = {name: page for page in self.pages for name in page.tensors}
        object.__setattr__(self, "_page_of", of)

    def page_of(self, name: str) -> PageUnit | None:
        """Return the page that holds a tensor; None when it is resident."""
        return self._page_of.get(self.canonical.get(name, name))  # type: ignore[attr-defined, no-any-return]

    def homed(self, home: str) -> tuple[PageUnit, ...]:
        """Return the pages of one home, in order."""
        return tuple(page for page in self.pages if page.home == home)

    @property
    def arena_nbytes(self) -> int:
        """Bytes of host memory that CPU pages take."""
        return sum(page.layout.extent for page in self.homed("cpu"))

    @property
    def store_nbytes(self) -> int:
        """Bytes of disk that disk pages take, without the manifest."""
        return sum(page.layout.extent for page in self.homed("disk"))

    @property
    def slot_nbytes(self) -> int:
        """Size of one slot: the largest page that takes turns."""
        return max((page.layout.nbytes for page in self.pages if not page.outer), default=0)

    def device_allocations(self, slots: int = 2) -> list[int]:
        """Bytes of each slot on the execution device, and of each page that has a place of its own there."""
        own = [page.layout.nbytes for page in self.pages if page.outer]
        turning = sum(1 for page in self.pages if not page.outer)
        return own + [self.slot_nbytes] * min(slots, turning)

    def device_nbytes(self, slots: int = 2) -> int:
        """Bytes on the execution device that paging takes."""
        return sum(self.device_allocations(slots))


def plan_pages(
    model: nn.Module,
    specs: Mapping[str, TensorSpec],
    device_map: Mapping[str, Placement],
    *,
    execution_device: Placement,
    no_split_module_classes: Sequence[str] | str | None = (),
    offload_buffers: bool = False,
    ties: Iterable[Sequence[str]] | None = None,
    page_cpu: bool | None = None,
) -> PagePlan:
    """Turn a device map into pages.

    For each offloaded entry of the map a page is: a module whose class is in ``no_split_module_classes``; an element
    of a ``ModuleList``, ``Sequential`` or ``ModuleDict``; a module with no such list below it. Other modules are
    descended into; what they hold beside their children is a page of its own. Tensors used by several pages' modules
    (tied ones) are a page that each of them asks for.

    Args:
        model: its structure; the tensors may be on the meta device.
        specs: final form of every parameter and buffer, by full name.
        device_map: module or tensor name to device; the longest name that is a prefix counts.
        execution_device: where pages are brought to.
        no_split_module_classes: names of classes whose modules stay whole.
        offload_buffers: page persistent buffers too; otherwise all are resident on the execution device.
        ties: names that are one tensor. ``None``: those that are one object in the model.
        page_cpu: page what the map puts on the CPU. ``None``: unless execution is there.

    Raises:
        PlanError: the map leaves a tensor out, or names nothing in the model.
    """
    execution = as_device(execution_device)
    classes = (
        [no_split_module_classes]
        if isinstance(no_split_module_classes, str)
        else no_split_module_classes or ()
    )
    page_cpu = execution.type != "cpu" if page_cpu is None else page_cpu
    tree = ModuleTree(model, specs, device_map, set(classes), {"cpu", "disk"} if page_cpu else {"disk"})
    canonical = _canonical(model, specs, ties)

    askers_of: dict[str, set[str]] = {}
    homes_of: dict[str, set[str]] = {}
    fixed: dict[str, torch.device] = {}
    for name, spec in specs.items():
        key, home = canonical[name], tree.home(name)
        stays = spec.is_buffer and not (offload_buffers and spec.persistent)
        if home is None:
            fixed.setdefault(key, tree.device(name, execution))
        elif stays:
            fixed.setdefault(key, execution)
        else:
            homes_of.setdefault(key, set()).add(home)
        askers_of.setdefault(key, set()).add(tree.asker(name))
    # a shared tensor with one resident user is resident for all: paging a second copy of it would only cost
    resident = {name: fixed[key] for name, key in canonical.items() if key in fixed}
    paged = [name for name in specs if name == canonical[name] and name not in fixed]
    groups: dict[tuple[str, frozenset[str]], list[str]] = {}
    for name in paged:
        home = "cpu" if "cpu" in homes_of[name] else "disk"
        groups.setdefault((home, frozenset(askers_of[name])), []).append(name)

    order = {path: index for index, path in enumerate(tree.modules)}
    # paths that an asker lies in: looked up, as comparing every asker with every other grows with the square
    above = {path for _, askers in groups for asker in askers for path in islice(prefixes(asker), 1, None)}
    pages: list[PageUnit] = []
    ordered = sorted(groups.items(), key=lambda group: (min(order[a] for a in group[0][1]), group[0][0]))
    for (home, askers), names in ordered:
        paths = tuple(sorted(askers, key=order.__getitem__))
        outer = not above.isdisjoint(paths)
        layout = PageLayout.of({name: specs[name] for name in names})
        pages.append(
            PageUnit(len(pages), paths[0] or type(model).__name__, home, tuple(names), layout, paths, outer)
        )
    moved = tree.moved(execution, {name: fixed[canonical[name]] for name in resident})
    return PagePlan(tuple(pages), execution, resident, canonical, dict(specs), moved)


def _canonical(
    model: nn.Module, specs: Mapping[str, TensorSpec], ties: Iterable[Sequence[str]] | None
) -> dict[str, str]:
    """The first name of every tensor, by each of its names."""
    canonical = {name: name for name in specs}
    if ties is None:
        by_object: dict[int, list[str]] = {}
        for named in (model.named_parameters, model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                by_object.setdefault(id(tensor), []).append(name)
        ties = by_object.values()
    place = {name: index for index, name in enumerate(specs)}
    for group in ties:
        known = sorted((name for name in group if name in place), key=place.__getitem__)
        for name in known:
            canonical[name] = known[0]
    return canonical
