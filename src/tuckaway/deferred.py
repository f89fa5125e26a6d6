"""Tensors whose values are computed only when somebody asks: what :mod:`tuckaway.empty` builds models with.

A constructor makes tensors before anyone knows what for: ``torch.empty(4096, 4096)`` may become a parameter, whose
values a checkpoint will bring, or half of a rotary table that nothing but this constructor can make. So a tensor made
under :class:`Deferral` is a *deferred* one: on the meta device, with a record of the operations that led to it. A
parameter never looks back. Whatever else is still alive at the end, and whatever is asked for its values before
(``.item()``, ``.numpy()``, an ``if``), is made real by doing the recorded operations in their order.

Small tensors are made for real at once: recording them would cost more than they do. Everything here belongs to one
thread; nothing of torch is patched.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cache, partial
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["SMALL", "Deferral", "Record", "forget", "recorded", "remember"]

SMALL = 1 << 16
"""Elements below which a tensor is made for real: 256 KiB of fp32, initialized in 0.2 ms."""

aten = torch.ops.aten
_META = torch.device("meta")
_LIKES = {
    packet.default
    for packet in (
        aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like,
        aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty_strided,
    )
}  # fmt: skip
"""They take a shape from their argument, not values: known even when that is a parameter."""

_TICKS = itertools.count()
_NOTHING = tree_flatten(((), {}))[1]


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
    steps: list[_Step] = field(default_factory=list)
    real: torch.UntypedStorage | None = None


@dataclass(eq=False)
class _Step:
    """One operation; deferred arguments are :class:`_View`, tensors are copies of what they were."""

    tick: int
    function: Callable[..., Any]
    arguments: list[Any]
    structure: Any
    makes: list[tuple[int, Record]]

    def needs(self) -> Iterator[Record]:
        """Yield the records it reads or writes."""
        for argument in self.arguments:
            if isinstance(argument, _View):
                yield argument.record


@dataclass(frozen=True, eq=False)
class _View:
    """A tensor as a view of a storage."""

    record: Record
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def on(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """Return the view of a real storage."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.size, self.stride)  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True)
class _Blank:
    """A tensor of which only shape and dtype matter."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def make(self) -> torch.Tensor:
        """Return one; its untouched memory is only address space."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype)


class Deferral:
    """The deferred tensors of one thread, from the outermost context's beginning to its end."""

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}
        self._made: dict[int, StorageWeakRef] = {}
        self._alive: list[weakref.ref[torch.Tensor]] = []
        self._limit = 1024
        self._busy = False

    # What a dispatch mode asks

    def run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, defer: bool, stays: bool) -> Any:
        """Do, or defer, one aten operation.

        Args:
            function: the operation.
            args: its arguments.
            kwargs: its keyword arguments.
            defer: tensors may be deferred here.
            stays: deferred ones shall stay on the meta device, small ones too.
        """
        if self._busy:
            return function(*args, **kwargs)
        kind = _kind(function)
        if kind is _Kind.FACTORY:
            return self._factory(function, args, kwargs, defer, stays)
        if kind is _Kind.FILL and defer:
            target = args[0]
            if not target.is_meta:
                return function(*args, **kwargs)
            if self._of(target) is None:
                return target
        flat, structure = tree_flatten((args, kwargs))
        metas = [value for value in flat if isinstance(value, torch.Tensor) and value.is_meta]
        if not metas:
            result = self._noted(function(*args, **kwargs))
            if defer and stays and function is aten.lift_fresh.default:
                return self._given(result)
            return result
        if all(self._of(tensor) is not None for tensor in metas):
            return self._on_deferred(function, flat, structure, defer)
        return self._on_unknown(function, flat, structure, defer=defer, stays=stays)

    def _factory(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], defer: bool, stays: bool) -> Any:
        size = args[0] if args and isinstance(args[0], list | tuple) else None
        small = not stays and size is not None and math.prod(size) < SMALL
        if small or not defer or kwargs.get("device") == _META:
            return self._noted(function(*args, **kwargs))
        try:
            result = function(*args, **{**kwargs, "device": _META})
        except (NotImplementedError, RuntimeError):
            return self._noted(function(*args, **kwargs))
        if result.layout != torch.strided or (not stays and result.numel() < SMALL):
            return self._noted(function(*args, **kwargs))
        self._record(partial(function, *args, **kwargs), [], _NOTHING, result, stays=stays)
        return result

    def _given(self, tensor: torch.Tensor) -> torch.Tensor:
        """Defer a tensor that came with values (``torch.tensor([1, 2])``)."""
        result = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)
        flat, structure = tree_flatten(((tensor,), {}))
        self._record(aten.clone.default, flat, structure, result, stays=True)
        return result

    def _on_deferred(self, function: Any, flat: list[Any], structure: Any, defer: bool) -> Any:
        """An operation whose meta arguments are all deferred."""
        if any(isinstance(v, torch.Tensor) and v.is_meta and self._known(v).real is not None for v in flat):
            real = [v if not self._is_real_now(v) else self._real_view(v) for v in flat]
            return self._for_real(function, flat, real, structure)
        tags = function.tags
        written = _written(function, flat, structure)
        if (
            not defer
            or torch.Tag.data_dependent_output in tags
            or torch.Tag.dynamic_output_shape in tags
            or any(not tensor.is_meta for tensor in written)
        ):
            return self._asked(function, flat, structure)
        args, kwargs = tree_unflatten([_to_meta(v) for v in flat], structure)
        if _kind(function) is _Kind.FILL:
            self._record(function, flat, structure, None, stays=False, written=written)
            return args[0]
        if kwargs.get("device") == _META:
            return function(*args, **kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = _META
        try:
            result = function(*args, **kwargs)
        except (NotImplementedError, RuntimeError):
            return self._asked(function, flat, structure)
        leaves, _ = tree_flatten(result)
        if any(not isinstance(leaf, torch.Tensor) for leaf in leaves if leaf is not None):
            return self._asked(function, flat, structure)
        if torch.Tag.inplace_view not in tags:
            stays = any(self._known(t).stays for t in flat if isinstance(t, torch.Tensor) and t.is_meta)
            self._record(function, flat, structure, result, stays=stays, written=written)
        else:
            self.watch(result)
        return result

    def _on_unknown(self, function: Any, flat: list[Any], structure: Any, *, defer: bool, stays: bool) -> Any:
        """An operation on parameters, whose values nobody knows."""
        if defer and function in _LIKES:
            args, kwargs = tree_unflatten(flat, structure)
            if kwargs.get("device") is None:
                result = function(*args, **kwargs)
                blank = [_Blank(v.dtype, tuple(v.shape), v.stride()) if isinstance(v, torch.Tensor) else v for v in flat]
                if not stays and result.numel() < SMALL:
                    args, kwargs = tree_unflatten([v.make() if isinstance(v, _Blank) else v for v in blank], structure)
                    return self._noted(function(*args, **kwargs))
                self._record(function, blank, structure, result, stays=stays)
                return result
        written = _written(function, flat, structure)
        for tensor in written:
            if tensor.is_meta:
                self.drop(tensor)
        if all(tensor.is_meta for tensor in written):
            flat = [_to_meta(v) for v in flat]
        args, kwargs = tree_unflatten(flat, structure)
        return function(*args, **kwargs)

    def _asked(self, function: Any, flat: list[Any], structure: Any) -> Any:
        """Somebody needs values: make the deferred arguments real and go on with those."""
        real = [self._real_view(v) if isinstance(v, torch.Tensor) and v.is_meta else v for v in flat]
        return self._for_real(function, flat, real, structure)

    def _for_real(self, function: Any, flat: list[Any], real: list[Any], structure: Any) -> Any:
        args, kwargs = tree_unflatten(real, structure)
        if any(isinstance(v, torch.Tensor) and v.is_meta for v in real):
            return self.run(function, args, kwargs, defer=True, stays=False)
        result = self._noted(function(*args, **kwargs))
        # an in-place operation returns its argument: the caller's object, not our view of its storage
        given = {id(now): was for was, now in zip(flat, real, strict=True) if was is not now}
        leaves, shape = tree_flatten(result)
        return tree_unflatten([given.get(id(leaf), leaf) for leaf in leaves], shape)

    # Records

    def _of(self, tensor: torch.Tensor) -> Record | None:
        if not tensor.is_meta or tensor.layout != torch.strided:
            return None
        record = self._records.get(tensor.untyped_storage()._cdata)
        return None if record is None or record.storage.expired() else record

    def _known(self, tensor: torch.Tensor) -> Record:
        record = self._of(tensor)
        if record is None:
            raise KeyError("the tensor is not deferred")
        return record

    def _is_real_now(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.is_meta and self._known(value).real is not None

    def _record(
        self,
        function: Any,
        flat: list[Any],
        structure: Any,
        result: Any,
        *,
        stays: bool,
        written: list[torch.Tensor] | None = None,
    ) -> None:
        """Enter one step in the records of the storages it makes and writes."""
        arguments = [self._kept(value) for value in flat]
        step = _Step(next(_TICKS), function, arguments, structure, [])
        for record in {id(r): r for r in (self._of(t) for t in written or ()) if r is not None}.values():
            record.steps.append(step)
        for index, leaf in enumerate(tree_flatten(result)[0]):
            if not isinstance(leaf, torch.Tensor):
                continue
            if self._of(leaf) is None:
                reference = StorageWeakRef(leaf.untyped_storage())
                record = Record(reference, stays, [step])
                self._records[leaf.untyped_storage()._cdata] = record
                step.makes.append((index, record))
            self.watch(leaf)
        self._tidy()

    def _kept(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        record = self._of(value)
        if record is None:
            return value.detach().clone()
        return _View(record, value.dtype, tuple(value.shape), value.stride(), int(value.storage_offset()))

    def watch(self, value: Any) -> None:
        """Remember tensors of the caller's that stand for deferred ones."""
        leaves = [value] if isinstance(value, torch.Tensor) else tree_flatten(value)[0]
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and self._of(leaf) is not None:
                self._alive.append(weakref.ref(leaf))

    def _noted(self, result: Any) -> Any:
        for leaf in [result] if isinstance(result, torch.Tensor) else tree_flatten(result)[0]:
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                for part in _parts(leaf):
                    self._made[part._cdata] = StorageWeakRef(part)
        self._tidy()
        return result

    def _tidy(self) -> None:
        if len(self._alive) + len(self._made) + len(self._records) < self._limit:
            return
        self._alive = [reference for reference in self._alive if reference() is not None]
        self._made = {key: reference for key, reference in self._made.items() if not reference.expired()}
        self._records = {key: record for key, record in self._records.items() if not record.storage.expired()}
        self._limit = 1024 + 2 * (len(self._alive) + len(self._made) + len(self._records))

    def drop(self, tensor: torch.Tensor) -> None:
        """Forget how a tensor came about: it is a parameter, or was written with values nobody knows."""
        if tensor.layout == torch.strided:
            self._records.pop(tensor.untyped_storage()._cdata, None)

    def made_here(self, tensor: torch.Tensor) -> bool:
        """Tell whether a real tensor was made since the context began."""
        parts = list(_parts(tensor))
        return bool(parts) and all(p._cdata in self._made and not self._made[p._cdata].expired() for p in parts)

    # Values

    def _real_view(self, tensor: torch.Tensor) -> torch.Tensor:
        record = self._known(tensor)
        view = self._kept(tensor)
        with self.resting():
            storage = realize(record)
            self._made[storage._cdata] = StorageWeakRef(storage)
            return view.on(storage)  # type: ignore[no-any-return]

    @contextmanager
    def resting(self) -> Iterator[None]:
        """While this lasts, operations are done as they are."""
        before, self._busy = self._busy, True
        try:
            with torch.no_grad():
                yield
        finally:
            self._busy = before

    def make_real(self, tensor: torch.Tensor) -> bool:
        """Turn a deferred tensor, the object itself, into a real one. False when torch cannot exchange it."""
        if self._of(tensor) is None:
            return True
        real = self._real_view(tensor)
        if tensor.is_leaf:
            real.requires_grad_(tensor.requires_grad)
        # our own weak reference would forbid the exchange
        self._alive = [r for r in self._alive if (other := r()) is not None and other is not tensor]
        return exchange(tensor, real)

    def finish(self) -> list[torch.Tensor]:
        """Make all that is alive real, but parameters and what shall stay; return what could not be."""
        alive = {id(t): t for t in (reference() for reference in self._alive) if t is not None}
        self._alive = []
        wanted = [t for t in alive.values() if not isinstance(t, torch.nn.Parameter) and self._of(t) is not None]
        del alive
        wanted = [t for t in wanted if not self._known(t).stays]
        failed = []
        # views first: each keeps its base from being exchanged
        wanted.sort(key=lambda t: t._base is None)
        for tensor in wanted:
            if not self.make_real(tensor):
                failed.append(tensor)
        return failed

    def records(self) -> Iterator[Record]:
        """Yield the records of what is still on the meta device."""
        for record in self._records.values():
            if not record.storage.expired():
                yield record


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
            if isinstance(argument, _View):
                storage = argument.record.real or storages[id(argument.record)]
                values.append(argument.on(storage))
            elif isinstance(argument, _Blank):
                values.append(argument.make())
            else:
                values.append(argument)
        args, kwargs = tree_unflatten(values, step.structure)
        leaves = tree_flatten(step.function(*args, **kwargs))[0]
        for index, made in step.makes:
            storages[id(made)] = leaves[index].untyped_storage()
    for key, one in needed.items():
        # whoever still looks at it must see these very values: a random one would differ the next time
        if one is record or not one.storage.expired():
            one.real = storages[key]
            one.steps = []
    return storages[id(record)]


def exchange(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Give ``tensor``, the object, the contents of ``other``. False when torch refuses (others hold it weakly)."""
    other.__dict__.update({k: v for k, v in tensor.__dict__.items() if k not in other.__dict__})
    try:
        torch.utils.swap_tensors(tensor, other)
    except RuntimeError:
        return False
    return True


class _Kind(Enum):
    FACTORY = auto()
    """Makes a tensor from no other, on a device it is told."""
    FILL = auto()
    """Writes to its first argument and looks at no other tensor: what initializes weights."""
    OTHER = auto()


@cache
def _kind(function: Any) -> _Kind:
    arguments = function._schema.arguments
    tensors = [a for a in arguments if "Tensor" in str(a.type)]
    if not tensors and any(a.name == "device" for a in arguments):
        return _Kind.FACTORY
    tags = function.tags
    fills = torch.Tag.inplace in tags and torch.Tag.inplace_view not in tags
    if fills and len(tensors) == 1 and tensors[0] is arguments[0] and str(tensors[0].type) == "Tensor":
        return _Kind.FILL
    return _Kind.OTHER


def _written(function: Any, flat: list[Any], structure: Any) -> list[torch.Tensor]:
    schema = function._schema
    if not schema.is_mutable:
        return []
    args, kwargs = tree_unflatten(flat, structure)
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    values = [given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, torch.Tensor)]


def _to_meta(value: Any) -> Any:
    return value.to(_META) if isinstance(value, torch.Tensor) and not value.is_meta else value


def _parts(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """Storages of a tensor; of a wrapper, those of the tensors in it."""
    names = getattr(tensor, "__tensor_flatten__", None)
    if names is None:
        if tensor.layout == torch.strided:
            yield tensor.untyped_storage()
        return
    for name in names()[0]:
        yield from _parts(getattr(tensor, name))


# Records outlive their context where a tensor stays on the meta device: a loader may want its values

_remembered: dict[int, Record] = {}
_lock = threading.Lock()


def remember(records: Iterator[Record]) -> None:
    """Keep records, by the storage on the meta device that stands for them."""
    with _lock:
        for key in [key for key, record in _remembered.items() if record.storage.expired()]:
            del _remembered[key]
        for record in records:
            _remembered[record.storage.cdata] = record


def recorded(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the values of a tensor on the meta device, or None when nobody recorded how it came about."""
    if not tensor.is_meta or tensor.layout != torch.strided:
        return None
    with _lock:
        record = _remembered.get(tensor.untyped_storage()._cdata)
    if record is None or record.storage.expired():
        return None
    view = _View(record, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
    with torch.no_grad():
        return view.on(realize(record))


def forget(tensor: torch.Tensor) -> None:
    """Drop the record of a tensor."""
    with _lock:
        _remembered.pop(tensor.untyped_storage()._cdata, None)
