"""Tensors whose values are computed only when somebody asks: what :mod:`tuckaway.empty.contexts` builds models with.

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
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_unflatten

from tuckaway.empty.operations import LIKES, Kind, kind_of, written_by
from tuckaway.empty.records import Blank, Record, Step, View, gone, realize, weakly

__all__ = ["SMALL", "Deferral", "exchange"]

SMALL = 1 << 16
"""Elements below which a tensor is made for real: 256 KiB of fp32, initialized in 0.2 ms."""

aten = torch.ops.aten
_META = torch.device("meta")
_TICKS = itertools.count()
_NOTHING = tree_flatten(((), {}))[1]


class Deferral:
    """The deferred tensors of one thread, from the outermost context's beginning to its end."""

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}
        self._made: dict[int, StorageWeakRef] = {}
        self._alive: list[weakref.ref[torch.Tensor]] = []
        self._limit = 1024
        self._busy = False

    # What a dispatch mode asks

    def run(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, defer: bool, stays: bool
    ) -> Any:
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
        kind = kind_of(function)
        if kind is Kind.FACTORY:
            return self._factory(function, args, kwargs, defer, stays)
        if kind is Kind.FILL and defer:
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

    def _factory(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], defer: bool, stays: bool
    ) -> Any:
        size = args[0] if args and isinstance(args[0], list | tuple) else None
        small = not stays and size is not None and math.prod(size) < SMALL
        if defer and function is aten.scalar_tensor.default:
            kwargs = {**kwargs, "device": torch.device("cpu")}  # the 0 of x[1] = 0, made where x seems to be
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
        written = written_by(function, flat, structure)
        if (
            not defer
            or torch.Tag.data_dependent_output in tags
            or torch.Tag.dynamic_output_shape in tags
            or any(not tensor.is_meta for tensor in written)
        ):
            return self._asked(function, flat, structure)
        # "to the device of that parameter": were it not for us, that would not be the meta device
        flat = [None if isinstance(v, torch.device) and v == _META else v for v in flat]
        args, kwargs = tree_unflatten([_to_meta(v) for v in flat], structure)
        if kind_of(function) is Kind.FILL:
            self._record(function, flat, structure, None, stays=False, written=written)
            return args[0]
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
        if defer and function in LIKES:
            args, kwargs = tree_unflatten(flat, structure)
            if kwargs.get("device") is None:
                result = function(*args, **kwargs)
                blank = [Blank.like(v) if isinstance(v, torch.Tensor) else v for v in flat]
                if not stays and result.numel() < SMALL:
                    args, kwargs = tree_unflatten(
                        [v.make() if isinstance(v, Blank) else v for v in blank], structure
                    )
                    return self._noted(function(*args, **kwargs))
                self._record(function, blank, structure, result, stays=stays)
                return result
        written = written_by(function, flat, structure)
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
        return None if record is None or gone(record.storage) else record

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
        step = Step(next(_TICKS), function, arguments, structure, [])
        for record in {id(r): r for r in (self._of(t) for t in written or ()) if r is not None}.values():
            record.steps.append(step)
        for index, leaf in enumerate(tree_flatten(result)[0]):
            if not isinstance(leaf, torch.Tensor):
                continue
            if self._of(leaf) is None:
                reference = weakly(leaf.untyped_storage())
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
        return View(record, value.dtype, tuple(value.shape), value.stride(), int(value.storage_offset()))

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
                    self._made[part._cdata] = weakly(part)
        self._tidy()
        return result

    def _tidy(self) -> None:
        if len(self._alive) + len(self._made) + len(self._records) < self._limit:
            return
        self._alive = [reference for reference in self._alive if reference() is not None]
        self._made = {key: reference for key, reference in self._made.items() if not gone(reference)}
        self._records = {key: record for key, record in self._records.items() if not gone(record.storage)}
        self._limit = 1024 + 2 * (len(self._alive) + len(self._made) + len(self._records))

    def drop(self, tensor: torch.Tensor) -> None:
        """Forget how a tensor came about: it is a parameter, or was written with values nobody knows."""
        if tensor.layout == torch.strided:
            self._records.pop(tensor.untyped_storage()._cdata, None)

    def made_here(self, tensor: torch.Tensor) -> bool:
        """Tell whether a real tensor was made since the context began."""
        parts = list(_parts(tensor))
        return bool(parts) and all(p._cdata in self._made and not gone(self._made[p._cdata]) for p in parts)

    # Values

    def _real_view(self, tensor: torch.Tensor) -> torch.Tensor:
        record = self._known(tensor)
        view = self._kept(tensor)
        with self.resting():
            storage = realize(record)
            self._made[storage._cdata] = weakly(storage)
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
        wanted = [
            t for t in alive.values() if not isinstance(t, torch.nn.Parameter) and self._of(t) is not None
        ]
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
            if not gone(record.storage):
                yield record


def exchange(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Give ``tensor``, the object, the contents of ``other``. False when torch refuses (others hold it weakly)."""
    other.__dict__.update({k: v for k, v in tensor.__dict__.items() if k not in other.__dict__})
    try:
        torch.utils.swap_tensors(tensor, other)
    except RuntimeError:
        return False
    return True


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
