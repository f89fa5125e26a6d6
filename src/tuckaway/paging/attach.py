"""Turn a loaded model into a paged one, and back: hooks, meta tensors, and what a paged model refuses."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from tuckaway.errors import PagingError
from tuckaway.formats import Components
from tuckaway.paging.homes import PageHomes
from tuckaway.paging.hooks import PagedWeights, PageHook, refuse_copy
from tuckaway.paging.pager import Binding, Page, Pager
from tuckaway.paging.units import PagePlan, as_device

__all__ = ["Paging", "attach", "detach", "is_paged", "materialize", "offloaded_tensor", "paging_of"]

_ATTRIBUTE = "_tuckaway_paging"
_MOVES = (
    "to",
    "cuda",
    "cpu",
    "xpu",
    "npu",
    "half",
    "float",
    "double",
    "bfloat16",
    "type",
    "to_empty",
    "share_memory",
)


class Paging:
    """The paging of one model.

    Attributes:
        plan: what is paged.
        homes: where it is kept.
        pager: who brings it in.
        hooks: every hook, by module.
    """

    def __init__(self, model: nn.Module, plan: PagePlan, homes: PageHomes, slots: int) -> None:
        self.plan = plan
        self.homes = homes
        self._model = weakref.ref(model)
        self._lock = threading.RLock()
        pages = self._pages(model)
        self.pager = Pager(pages, homes, plan.execution_device, slots=slots)
        self.hooks: list[tuple[nn.Module, PageHook]] = []
        self._restored: weakref.WeakValueDictionary[tuple[str, torch.device], torch.Tensor] = (
            weakref.WeakValueDictionary()
        )

    def _pages(self, model: nn.Module) -> list[Page]:
        bindings: dict[str, list[Binding]] = {name: [] for page in self.plan.pages for name in page.tensors}
        meta: dict[str, torch.Tensor] = {}
        seen: set[tuple[int, str]] = set()
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, spec in self.plan.specs.items():
            canonical = self.plan.canonical[name]
            if canonical not in bindings:
                continue
            path, _, attribute = name.rpartition(".")
            module = modules[path]
            if (id(module), attribute) in seen:
                continue
            seen.add((id(module), attribute))
            if canonical not in meta:
                with torch.inference_mode(False):
                    meta[canonical] = spec.build(spec.empty("meta"))
            bindings[canonical].append(Binding(module, attribute, canonical, spec.is_buffer, meta[canonical]))
        return [
            Page(unit, self.plan.specs, [b for name in unit.tensors for b in bindings[name]])
            for unit in self.plan.pages
        ]

    @property
    def pages(self) -> tuple[Page, ...]:
        """Pages that are still paged."""
        return tuple(page for page in self.pager.pages if not page.gone)

    def read(self, name: str, device: torch.device | None = None) -> torch.Tensor:
        """Return a paged tensor, as a module would hold it, read from its home.

        Args:
            name: any of its names.
            device: where to; None leaves it on the CPU, where it may be a view of the arena: do not write to it.
        """
        canonical = self.plan.canonical.get(name, name)
        components = self.homes.read(canonical)
        if device is not None:
            # off the arena, whose memory is let go of one day
            components = {key: part.to(device, copy=True) for key, part in components.items()}
        with torch.inference_mode(False):
            return self.plan.specs[canonical].build(components)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Replace a paged tensor in its home: the next turn of its page brings the new value.

        Args:
            name: any of its names.
            tensor: of the same shape and format, on any device; a plain float tensor is cast.

        Raises:
            PagingError: it is not paged any more, in use by a forward, or of another shape or format.
            StoreBusy: its page is on disk and another process, or another model, uses the store.
        """
        with self._lock:
            unit = self.plan.page_of(name)
            page = None if unit is None else self.pager.pages[unit.index]
            if page is None or page.gone:
                raise PagingError(f"{name!r} is not paged")
            spec = self.plan.specs[name]
            if spec.layout is None and tensor.is_floating_point() and spec.dtype.is_floating_point:
                tensor = tensor.detach().to(spec.dtype)
            self.pager.forget(page)
            try:
                self.homes.replace(name, tensor)
            except ValueError as error:
                raise PagingError(f"{name!r} cannot be replaced: {error}") from error

    def take_out(self, pages: Sequence[Page], device: torch.device) -> None:
        """Stop paging some pages and leave their tensors on ``device``; the last one closes the homes.

        Raises:
            PagingError: a forward is using one of them.
            StoreError: its bytes cannot be read.
        """
        with self._lock:
            for page in pages:
                if page.gone:
                    continue
                if page.turns:
                    raise PagingError(
                        f"the page {page.unit.name!r} is in use by a forward",
                        hint="wait for the forward to end",
                    )
                self._take_out(page, device)
            if not self.pages:
                self._end()

    def _take_out(self, page: Page, device: torch.device) -> None:
        real: dict[str, torch.Tensor] = {}
        for binding in page.bindings:
            if binding.name not in real:
                tensor = self.read(binding.name, device)
                if isinstance(tensor, nn.Parameter):
                    tensor.requires_grad_(binding.away.requires_grad)
                real[binding.name] = tensor
        self.pager.take_out(page)
        for binding in page.bindings:
            # leave alone what somebody put in its place
            if binding.tensors.get(binding.attribute) is binding.away:
                binding.tensors[binding.attribute] = real[binding.name]

    def _end(self) -> None:
        model = self._model()
        if model is not None:
            for name in (*_MOVES, _ATTRIBUTE):
                model.__dict__.pop(name, None)
        self.close()

    def close(self) -> None:
        """Stop the worker, unpin, close the store. The model cannot run any more, unless its pages were taken out."""
        self.pager.close()
        self.homes.close()

    def __deepcopy__(self, memo: object) -> NoReturn:
        refuse_copy()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_copy()


def attach(
    model: nn.Module,
    plan: PagePlan,
    homes: PageHomes | None = None,
    *,
    slots: int = 2,
    skip_keys: str | Collection[str] | None = None,
    io_same_device: bool = True,
) -> Paging:
    """Make a model paged: its paged tensors are on the meta device but for their module's turn.

    Args:
        model: resident tensors are bound already, on their devices.
        plan: of :func:`~tuckaway.paging.plan_pages` for this model.
        homes: filled and committed; closed with the model's paging. May be None if the plan has no pages.
        slots: pages on the execution device at once.
        skip_keys: keyword arguments that are not moved to the execution device.
        io_same_device: bring the model's output to where its input was.

    Raises:
        PagingError: the model is paged already, or a tensor that is to be resident has no value.
    """
    if paging_of(model) is not None:
        raise PagingError(
            "the model is paged already", hint="bring it back first: tuckaway.materialize(model)"
        )
    if homes is None:
        homes = PageHomes.create(plan)
    for name in plan.resident:
        if _tensor(model, name).device.type == "meta":
            raise PagingError(
                f"{name!r} is to be resident and has no value", hint="load or initialize it first"
            )
    homes.commit()
    if homes.arena is not None:
        while homes.pin_step():
            pass
    paging = Paging(model, plan, homes, slots)
    modules = dict(model.named_modules(remove_duplicate=False))
    for page in paging.pager.pages:
        for binding in page.bindings:
            binding.tensors[binding.attribute] = binding.away
    _hook(model, paging, modules, skip_keys, io_same_device)
    object.__setattr__(model, _ATTRIBUTE, paging)
    if paging.pages:
        for name in _MOVES:
            if hasattr(model, name):
                model.__dict__[name] = _refusal(name)
    return paging


def _hook(
    model: nn.Module,
    paging: Paging,
    modules: dict[str, nn.Module],
    skip_keys: str | Collection[str] | None,
    io_same_device: bool,
) -> None:
    plan = paging.plan
    asked: dict[int, list[Page]] = {}
    holders: dict[int, list[Page]] = {}
    for page in paging.pager.pages:
        for asker in dict.fromkeys(id(modules[path]) for path in page.unit.askers):
            asked.setdefault(asker, []).append(page)
        for owner in dict.fromkeys(id(binding.module) for binding in page.bindings):
            holders.setdefault(owner, []).append(page)
    moved = {id(modules[path]): device for path, device in plan.moved.items()}
    done: set[int] = set()
    for path, module in modules.items():
        key = id(module)
        root = module is model
        if key in done or not (root or key in asked or key in holders or key in moved):
            continue
        done.add(key)
        driven = root or key in asked or key in moved
        device = moved.get(key, plan.execution_device)
        hook = PageHook(
            paging,
            module,
            asked.get(key, []) if driven else holders[key],
            device,
            io_same_device=root and io_same_device,
            skip_keys=skip_keys,
            weights=PagedWeights(paging, _names_below(path, plan)),
        )
        if driven:
            hook.drive()
        object.__setattr__(module, "_hf_hook", hook)
        paging.hooks.append((module, hook))


def _names_below(path: str, plan: PagePlan) -> dict[str, str]:
    start = f"{path}." if path else ""
    return {
        name[len(start) :]: name
        for name in plan.specs
        if name.startswith(start) and plan.page_of(name) is not None
    }


def paging_of(model: nn.Module) -> Paging | None:
    """Return a model's paging; None if it is not paged."""
    return model.__dict__.get(_ATTRIBUTE)


def is_paged(model: nn.Module, name: str) -> bool:
    """Tell whether the tensor of this full name is paged."""
    paging = paging_of(model)
    unit = None if paging is None else paging.plan.page_of(name)
    return paging is not None and unit is not None and not paging.pager.pages[unit.index].gone


def offloaded_tensor(model: nn.Module, name: str) -> Components | None:
    """Return a paged tensor's components from its home, without touching the slots; None if it is not paged.

    On the CPU; those of CPU pages are views of the arena, not to be written to.

    Raises:
        StoreCorrupt: the store's file is damaged.
        ChecksumError: bytes changed on disk.
    """
    paging = paging_of(model)
    return None if paging is None or not is_paged(model, name) else paging.homes.read(name)


def materialize(model: nn.Module, device: torch.device | str | int | None = None) -> nn.Module:
    """Bring every paged tensor of a model back and remove all hooks: it is an ordinary model again.

    Args:
        model: a paged model; one that is not paged is returned as it is.
        device: where paged tensors go; ``None``: the device they execute on. Resident ones stay where they are.

    Raises:
        PagingError: a forward is under way.
        OutOfMemoryError: torch's, when the device has no room; the model stays paged, with some pages resident.

    Example:
        >>> import tuckaway
        >>> tuckaway.materialize(torch.nn.Linear(2, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """
    paging = paging_of(model)
    if paging is None:
        return model
    paging.take_out(paging.pages, paging.plan.execution_device if device is None else as_device(device))
    for module, hook in paging.hooks:
        hook.remove()
        if module.__dict__.get("_hf_hook") is hook:
            del module.__dict__["_hf_hook"]
    paging.hooks.clear()
    for name in (*_MOVES, _ATTRIBUTE):
        model.__dict__.pop(name, None)
    with contextlib.suppress(AttributeError):
        del model.hf_device_map
    return model


detach = materialize


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise PagingError(
            f"a paged model cannot be moved or converted as a whole ({name})",
            hint="load it with another device_map or dtype, or bring it back first: tuckaway.materialize(model)",
        )

    refuse.__name__ = name
    return refuse


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    path, _, attribute = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), attribute)
    if not isinstance(tensor, torch.Tensor):
        raise PagingError(f"{name!r} is no tensor of the model")
    return tensor
