"""How deferred tensors came about: the operations recorded for each storage, and doing them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["Blank", "Record", "Step", "View", "forget", "gone", "realize", "recorded", "remember", "weakly"]


def weakly(storage: torch.UntypedStorage) -> StorageWeakRef:
    """Refer to a storage without keeping its memory; its address is not given to another meanwhile."""
    return StorageWeakRef(storage)


def gone(reference: StorageWeakRef) -> bool:
    """Tell whether nobody has the storage any more."""
    return bool(reference.expired())


@dataclass(eq=False)
class Record:
    """How the contents of one storage came about.

    Args:
        storage: of the meta tensors that stand for it.
        stays: it is wanted on the meta device; nothing makes it real unasked.
        steps: the operations that wrote to it, in order.
        real: the storage, once somebody asked.
    """

    storage: StorageWeakRef
    stays: bool
    steps: list[Step] = field(default_factory=list)
    real: torch.UntypedStorage | None = None


@dataclass(eq=False)
class Step:
    """One operation; deferred arguments are :class:`View`, tensors are copies of what they were."""

    tick: int
    function: Callable[..., Any]
    arguments: list[Any]
    structure: Any
    makes: list[tuple[int, Record]]

    def needs(self) -> Iterator[Record]:
        """Yield the records it reads or writes."""
        for argument in self.arguments:
            if isinstance(argument, View):
                yield argument.record


@dataclass(frozen=True, eq=False)
class View:
    """A tensor as a view of a storage."""

    record: Record
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def on(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """Return the view of a real storage."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class Blank:
    """A tensor of which only shape and dtype matter."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def like(cls, tensor: torch.Tensor) -> Blank:
        """Describe a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape), tensor.stride())

    def make(self) -> torch.Tensor:
        """Return one; its untouched memory is only address space."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="cpu")


def realize(record: Record) -> torch.UntypedStorage:
    """Do the operations that led to a storage, once, and return it."""
    if record.real is not None:
        return record.real
    needed: dict[int, Record] = {}
    stack = [record]
    while stack:
        current = stack.pop()
        if id(current) in needed or current.real is not None:
            continue
        needed[id(current)] = current
        for step in current.steps:
            stack.extend(step.needs())
    storages: dict[int, torch.UntypedStorage] = {}
    steps = {id(step): step for one in needed.values() for step in one.steps}
    for step in sorted(steps.values(), key=lambda step: step.tick):
        values: list[Any] = []
        for argument in step.arguments:
            if isinstance(argument, View):
                storage = argument.record.real or storages[id(argument.record)]
                values.append(argument.on(storage))
            elif isinstance(argument, Blank):
                values.append(argument.make())
            else:
                values.append(argument)
        args, kwargs = tree_unflatten(values, step.structure)
        leaves = tree_flatten(step.function(*args, **kwargs))[0]
        for index, made in step.makes:
            storages[id(made)] = leaves[index].untyped_storage()
    for key, one in needed.items():
        # whoever still looks at it must see these very values: a random one would differ the next time
        if one is record or not gone(one.storage):
            one.real = storages[key]
            one.steps = []
    return storages[id(record)]


# Records outlive their context where a tensor stays on the meta device: a loader may want its values

_remembered: dict[int, Record] = {}
_lock = threading.Lock()


def remember(records: Iterator[Record]) -> None:
    """Keep records, by the storage on the meta device that stands for them."""
    with _lock:
        for key in [key for key, record in _remembered.items() if gone(record.storage)]:
            del _remembered[key]
        for record in records:
            _remembered[record.storage.cdata] = record


def recorded(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the values of a tensor on the meta device, or None when nobody recorded how it came about."""
    if not tensor.is_meta or tensor.layout != torch.strided:
        return None
    with _lock:
        record = _remembered.get(tensor.untyped_storage()._cdata)
    if record is None or gone(record.storage):
        return None
    view = View(record, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
    with torch.no_grad():
        return view.on(realize(record))


def forget(tensor: torch.Tensor) -> None:
    """Drop the record of a tensor."""
    with _lock:
        _remembered.pop(tensor.untyped_storage()._cdata, None)
