"""Where pages live while they are not in a slot: the arena and the store behind one face.

The loader writes tensors here by name; the pager and :func:`~tuckaway.paging.offloaded_tensor` read them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import torch

from tuckaway.errors import StoreError
from tuckaway.formats import Components
from tuckaway.paging.arena import Arena
from tuckaway.paging.page import PageItem
from tuckaway.paging.store import Store
from tuckaway.paging.units import PagePlan, PageUnit
from tuckaway.tensor import TensorSpec, components_of

__all__ = ["PageHomes", "kept_pages"]


class PageHomes:
    """Arena and store of one plan. Made by :meth:`create`.

    Attributes:
        plan: the pages.
        arena: CPU pages; None without any.
        store: disk pages; None without any.
        cache: the disk pages that stay in memory once they were read; None without any.
    """

    def __init__(
        self,
        plan: PagePlan,
        arena: Arena | None,
        store: Store | None,
        kept: Sequence[PageUnit] = (),
        cache: Arena | None = None,
    ) -> None:
        self.plan = plan
        self.arena = arena
        self.store = store
        self.cache = cache
        self._kept = {page.index: number for number, page in enumerate(kept)}
        self._read: set[int] = set()
        self._number: dict[int, int] = {}
        for home in ("cpu", "disk"):
            self._number.update({page.index: number for number, page in enumerate(plan.homed(home))})

    @classmethod
    def create(
        cls,
        plan: PagePlan,
        *,
        offload_folder: str | os.PathLike[str] | None = None,
        fingerprint: str = "",
        pin: bool | None = None,
        disk_cache_bytes: int = 0,
    ) -> PageHomes:
        """Allocate host memory and open or begin the store.

        Args:
            plan: the pages.
            offload_folder: folder of the disk pages.
            fingerprint: what tells the model's weights from others; formats and layout are added to it. Empty:
                disk pages are written anew each time.
            pin: pin host memory; ``None``: when pages are brought to an accelerator.
            disk_cache_bytes: host memory that disk pages may take. Always the same ones stay: pages are used in a
                cycle, in which what was used last is needed last, so that a cache of the latest would never hit.

        Raises:
            StoreError: there are disk pages and no folder, or the folder cannot be used (its subclasses say why).
        """
        disk, cpu = plan.homed("disk"), plan.homed("cpu")
        store = None
        if disk:
            if offload_folder is None:
                raise StoreError(
                    f"{len(disk)} pages go to the disk ({disk[0].name!r}, ...), and no folder is given",
                    hint="pass offload_folder",
                )
            identity = f"{fingerprint} {_formats(plan)}" if fingerprint else ""
            store = Store.open_or_create(offload_folder, [page.layout for page in disk], identity)
        try:
            wanted = plan.execution_device.type != "cpu" if pin is None else pin
            kept = kept_pages(disk, disk_cache_bytes)
            arena, cache = (_arena(pages, wanted, plan.execution_device) for pages in (cpu, kept))
        except BaseException:
            if store is not None:
                store.abort()
            raise
        return cls(plan, arena, store, kept, cache)

    @property
    def reusable(self) -> bool:
        """The disk pages are there already: tensors whose home is ``"disk"`` need not be written."""
        return self.store is not None and self.store.reusable

    def home_of(self, name: str) -> str | None:
        """Return ``"cpu"``, ``"disk"``, or None for a resident tensor."""
        unit = self.plan.page_of(name)
        return None if unit is None else unit.home

    def number(self, unit: PageUnit) -> int:
        """Return a page's number in its home."""
        return self._number[unit.index]

    def in_memory(self, unit: PageUnit) -> torch.Tensor | None:
        """Return a page's bytes in host memory; None when they are only on disk."""
        if unit.home == "cpu" and self.arena is not None:
            return self.arena.page(self._number[unit.index])
        if unit.index in self._read and self.cache is not None:
            return self.cache.page(self._kept[unit.index])
        return None

    def pinned(self, unit: PageUnit) -> torch.Tensor | None:
        """Return a page's bytes where they lie in pinned memory and stay; None when they do not."""
        arena = self.arena if unit.home == "cpu" else self.cache
        return self.in_memory(unit) if arena is not None and arena.pinned else None

    def kept(self, unit: PageUnit) -> torch.Tensor | None:
        """Return the memory that a disk page is to be read into and to stay in, padding included."""
        number = self._kept.get(unit.index)
        return None if number is None or self.cache is None else self.cache.extent(number)

    def keep(self, unit: PageUnit) -> torch.Tensor:
        """Note that :meth:`kept` memory was filled, and return the page's bytes."""
        assert self.cache is not None
        self._read.add(unit.index)
        return self.cache.page(self._kept[unit.index])

    # Writing

    def views(self, name: str) -> Components:
        """Return the place of a tensor whose home is ``"cpu"``: views to fill."""
        unit, canonical = self._unit(name)
        if self.arena is None or unit.home != "cpu":
            raise ValueError(f"the page of {name!r} is on disk; write it")
        return unit.layout.components(canonical, self.arena.page(self.number(unit)))

    def write(self, name: str, component: str, tensor: torch.Tensor) -> None:
        """Write one whole component of a tensor whose home is ``"disk"``.

        Args:
            name: any name of the tensor.
            component: which component; ``""`` for a plain tensor.
            tensor: its value, on the CPU, of the component's shape and dtype.

        Raises:
            StoreError: the disk failed.
            ValueError: another shape or dtype.
        """
        unit, canonical = self._unit(name)
        item = unit.layout[canonical, component]
        _check(tensor, item)
        if self.store is None or unit.home != "disk":
            raise ValueError(f"the page of {name!r} is in memory; fill its views")
        self.store.write(self.number(unit), item.offset, tensor)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a finished tensor, plain or quantized, from any device to its home.

        Raises:
            ValueError: another shape, dtype or format than planned.
        """
        for item, part in self._parts(name, tensor):
            if self.home_of(name) == "disk":
                self.write(name, item.key[1], part.cpu())
            else:
                self.views(name)[item.key[1]].copy_(part)

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrite a tensor after :meth:`commit`; a store that was changed is not used again.

        Raises:
            ValueError: another shape, dtype or format than planned.
            StoreBusy: others use the store.
        """
        parts = self._parts(name, tensor)
        if self.store is None or self.home_of(name) == "cpu":
            self.put(name, tensor)
            return
        self._read.discard(self._unit(name)[0].index)
        for item, part in parts:
            self.store.rewrite(self.number(self._unit(name)[0]), item, part.cpu())

    def _parts(self, name: str, tensor: torch.Tensor) -> list[tuple[PageItem, torch.Tensor]]:
        unit, canonical = self._unit(name)
        parts = {key: part.detach() for key, part in components_of(tensor).items()}
        items = [item for item in unit.layout.items if item.key[0] == canonical]
        layout, planned = getattr(tensor, "layout_info", None), self.plan.specs[canonical].layout
        same = (layout is None) == (planned is None) and (
            layout is None
            or planned is None
            or (layout.format, layout.shape) == (planned.format, planned.shape)
        )
        if not same or {item.key[1] for item in items} != parts.keys():
            raise ValueError(f"{name!r} is in another format than planned")
        for item in items:
            _check(parts[item.key[1]], item)
        return [(item, parts[item.key[1]]) for item in items]

    def pin(self) -> None:
        """Wait until host memory is pinned, which goes on since it was allocated.

        Raises:
            BaseException: what went wrong in the thread that pinned.
        """
        for arena in (self.arena, self.cache):
            if arena is not None:
                arena.pin()

    def commit(self) -> None:
        """Make what was written to disk valid; call it after the last write."""
        if self.store is not None:
            self.store.commit()

    # Reading

    def read(self, name: str) -> Components:
        """Return a tensor's components on the CPU: views of the arena, or read from disk and checked.

        Raises:
            StoreCorrupt: the store's file is damaged.
            ChecksumError: bytes changed on disk.
        """
        unit, canonical = self._unit(name)
        if self.store is None or unit.home == "cpu":
            return self.views(canonical)
        number, items = self.number(unit), unit.layout.items
        return {item.key[1]: self.store.read_item(number, item) for item in items if item.key[0] == canonical}

    def _unit(self, name: str) -> tuple[PageUnit, str]:
        unit = self.plan.page_of(name)
        if unit is None:
            raise KeyError(f"{name!r} is in no page")
        return unit, self.plan.canonical.get(name, name)

    # Ending

    def close(self) -> None:
        """Unpin, close and unlock; a committed store stays on disk."""
        for arena in (self.arena, self.cache):
            if arena is not None:
                arena.close()
        if self.store is not None:
            self.store.close()

    def abort(self) -> None:
        """Close, and remove a store that was never committed."""
        if self.store is not None:
            self.store.abort()
        self.close()


def _arena(pages: Sequence[PageUnit], pin: bool, device: torch.device) -> Arena | None:
    if not pages:
        return None
    arena = Arena([page.layout for page in pages], pin=pin, device=device if device.type == "cuda" else None)
    arena.start_pinning()
    return arena


def kept_pages(pages: Sequence[PageUnit], nbytes: int) -> list[PageUnit]:
    """Return the first pages, and smaller ones behind them, that fit into ``nbytes``: those that stay in memory."""
    fitting = []
    for page in pages:
        if page.layout.extent <= nbytes:
            fitting.append(page)
            nbytes -= page.layout.extent
    return fitting


def _check(tensor: torch.Tensor, item: PageItem) -> None:
    if tuple(tensor.shape) != item.shape or tensor.dtype != item.dtype:
        raise ValueError(
            f"{item.key[0]!r} is {list(item.shape)} {item.dtype} in its page, "
            f"not {list(tensor.shape)} {tensor.dtype}"
        )


def _formats(plan: PagePlan) -> str:
    """Hash of what the bytes of each disk page mean, beyond shapes and dtypes."""

    def meaning(spec: TensorSpec) -> str:
        layout = spec.layout
        if layout is None:
            return f"{spec.shape} {spec.dtype}"
        return f"{layout.format} {layout.shape} {layout.dtype} {layout.blocksize} {layout.nested} {layout.transposed}"

    digest = hashlib.sha256()
    for page in plan.homed("disk"):
        for name in page.tensors:
            digest.update(f"{name} {meaning(plan.specs[name])}\n".encode())
    return digest.hexdigest()
