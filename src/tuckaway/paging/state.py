"""The paging of one running model: :class:`Paging`, which its hooks and everything that asks about it share."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import nn

from tuckaway.errors import PagingError
from tuckaway.paging.away import placeholder
from tuckaway.paging.binding import Binding, Page, guard
from tuckaway.paging.homes import PageHomes
from tuckaway.paging.hooks import PageHook, refuse_copy
from tuckaway.paging.pager import Pager
from tuckaway.paging.units import PagePlan

__all__ = ["ATTRIBUTE", "MOVES", "Paging", "paging_of"]

ATTRIBUTE = "_tuckaway_paging"
"""Where a paged model keeps its :class:`Paging`."""

MOVES = (
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
    "_apply",
)
"""Methods of a module that would move or convert tensors which are elsewhere."""


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
                meta[canonical] = placeholder(self, canonical, spec)
            bindings[canonical].append(Binding(module, attribute, canonical, spec.is_buffer, meta[canonical]))
        return [
            Page(unit, self.plan.specs, [b for name in unit.tensors for b in bindings[name]])
            for unit in self.plan.pages
        ]

    @property
    def running(self) -> bool:
        """Whether this thread is in a forward of the model."""
        model = self._model()
        return any(hook.running for module, hook in self.hooks[:1] if module is model)

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
        with torch._C._InferenceMode(False):  # whatever interrupts it, the mode is as before
            return self.plan.specs[canonical].build(components)

    def fetch(self, name: str, *, requires_grad: bool) -> torch.Tensor:
        """Return a paged tensor on the execution device, in memory of its own, for a use outside its page's turn.

        Args:
            name: any of its names.
            requires_grad: whether what stands in for it wants a gradient, which is refused; it may be frozen by now.
        """
        tensor = self.read(name, self.plan.execution_device).requires_grad_(requires_grad)
        if requires_grad and torch.is_grad_enabled():
            guard(tensor, name)
        return tensor

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
            self.end_stale_turns()
            spec = self.plan.specs[name]
            if spec.layout is None and tensor.is_floating_point() and spec.dtype.is_floating_point:
                tensor = tensor.detach().to(spec.dtype)
            self.pager.forget(page)
            try:
                self.homes.replace(name, tensor)
            except ValueError as error:
                raise PagingError(f"{name!r} cannot be replaced: {error}") from error

    def end_stale_turns(self) -> None:
        """End what an interrupted forward of this thread left: its pages are in no turn any more."""
        if any(page.turns or page.users for page in self.pager.pages):
            for _, hook in self.hooks:
                hook.end_stale_turns()

    def take_out(self, pages: Sequence[Page], device: torch.device) -> None:
        """Stop paging some pages and leave their tensors on ``device``; the last one ends the paging.

        Raises:
            PagingError: a forward is using one of them.
            StoreError: its bytes cannot be read.
        """
        self.bring_back(pages, device)
        if not self.pages:
            self.end()

    def bring_back(self, pages: Sequence[Page], device: torch.device) -> None:
        """Stop paging some pages and leave their tensors on ``device``.

        Interrupted, it leaves some of them brought back and the others paged.

        Raises:
            PagingError: a forward is using one of them.
            StoreError: its bytes cannot be read.
        """
        self.end_stale_turns()
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

    def _take_out(self, page: Page, device: torch.device) -> None:
        real: dict[str, torch.Tensor] = {}
        for binding in page.bindings:
            if binding.name not in real:
                tensor = self.read(binding.name, device)
                if isinstance(tensor, nn.Parameter):
                    tensor.requires_grad_(binding.away.requires_grad)
                real[binding.name] = tensor
        for binding in page.bindings:
            # leave alone what somebody put in its place
            if binding.tensors.get(binding.attribute) is binding.away:
                binding.tensors[binding.attribute] = real[binding.name]
        self.pager.take_out(page)  # behind it: nobody brings in what is out of paging

    def end(self) -> None:
        """Close, and let the model be an ordinary one. Twice does no harm."""
        self.close()
        model = self._model()
        if model is not None:
            for name in (*MOVES, ATTRIBUTE):  # the last one is how this is found, should it be interrupted
                model.__dict__.pop(name, None)

    def close(self) -> None:
        """Stop the worker, unpin, close the store. The model cannot run any more, unless its pages were taken out."""
        self.pager.close()
        self.homes.close()

    def __deepcopy__(self, memo: object) -> NoReturn:
        refuse_copy()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_copy()


def paging_of(model: nn.Module) -> Paging | None:
    """Return a model's paging; None if it is not paged."""
    return model.__dict__.get(ATTRIBUTE)
