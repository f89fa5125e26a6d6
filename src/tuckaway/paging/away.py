"""What stands in a module for a tensor whose page is not in: a meta tensor that fetches the bytes when it is used.

Pages come in for the forward of the module they belong to. A tensor can be used outside of it: by a parent that never
calls the module (``self.rel_embeddings.weight``), by a lambda, by ``functional_call``, by a user who looks at it. Then
its bytes are read from their home for that one call, on the device that executes. Writing to it raises, where a plain
meta tensor would take the write and lose it. In a forward of the model it says that it is on the device that executes,
for models that move their inputs to where a weight is (``x.to(self.embed.weight.device)``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import ref

import torch
from torch import nn
from torch.utils._pytree import tree_map

from tuckaway.errors import PagingError
from tuckaway.paging.hooks import refuse_copy, uncompiled
from tuckaway.tensor import QuantizedTensor, TensorSpec

if TYPE_CHECKING:
    from tuckaway.paging.state import Paging

__all__ = ["placeholder"]

_ABOUT = frozenset((
    "__get__", "__set__", "__delete__", "__hash__", "__repr__", "__format__", "__len__", "size", "dim",
    "ndimension", "numel", "nelement", "stride", "element_size", "get_device", "storage_offset",
    "untyped_storage", "data_ptr", "detach", "alias", "requires_grad_", "register_hook",
    "register_post_accumulate_grad_hook", "share_memory_", "has_names", "_is_view", "backward",
    "__dir__"
))  # fmt: skip
"""Calls that ask a tensor about itself and need none of its values."""

_DEVICE = torch.Tensor.device.__get__
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_WRITES = frozenset(
    ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__")
)


def placeholder(paging: Paging, name: str, spec: TensorSpec) -> torch.Tensor:
    """Make the stand-in for a paged tensor.

    Args:
        paging: the model's paging, which is not kept alive.
        name: the name its bytes are kept under.
        spec: its form.
    """
    with torch._C._InferenceMode(False):  # whatever interrupts it, both modes are as before
        torch._C._set_grad_enabled(False)
        away = _wrap(spec.build(spec.empty("meta")), _AwayBuffer if spec.is_buffer else _AwayParameter, None)
        if isinstance(away, QuantizedTensor):
            away._is_param = not spec.is_buffer
        away._home = (ref(paging), name)
    return away  # type: ignore[no-any-return]


def _wrap(meta: torch.Tensor, kind: type[torch.Tensor], home: Any) -> Any:
    away: Any
    if isinstance(meta, QuantizedTensor):
        away = _AwayQuantized(meta, dtype=meta.dtype)
    else:
        with torch._C.DisableTorchFunctionSubclass():
            away = torch.Tensor._make_subclass(kind, meta.detach(), meta.requires_grad)
    away._home = home
    return away


class _Away(torch.Tensor):
    """Fetches what is asked of it."""

    _home: tuple[ref[Paging], str]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if torch.compiler.is_compiling():
            # bytes are read outside of graphs; traced, the reading would break it in a dozen places
            return uncompiled(_answer)(func, args, kwargs)
        return _answer(func, args, kwargs)

    def __deepcopy__(self, memo: object) -> NoReturn:
        refuse_copy()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_copy()


def _answer(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
    """Do a call with a tensor that is away among its arguments: with its bytes, if it needs any."""
    kwargs = dict(kwargs or {})
    name = getattr(func, "__name__", "")
    first = args[0] if args else None
    if func == _DEVICE and isinstance(first, _Away):
        paging = first._home[0]()
        if paging is not None and paging.running:
            return paging.plan.execution_device
    if isinstance(first, _Away) and func == _SET_DATA:
        return _set_data(first, args[1])
    if isinstance(first, _Away) and _only_casts(name, args, kwargs):
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return result if result is first else _wrap(result, _AwayBuffer, first._home)
    if name in _ABOUT or name.startswith("is_") or _stays_away(name, args, kwargs):
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if result is first or not isinstance(result, torch.Tensor):
            return result
        if isinstance(first, _Away) and (name == "detach" or func == _DATA):
            return _wrap(result, _AwayBuffer, first._home)
        # a view (weight.T): of nothing, unless the bytes are there
    if isinstance(first, _Away) and (name in _WRITES or _writes(name)):
        raise PagingError(
            f"{first._home[1]!r} is paged out and cannot be written to ({name})",
            hint="bring the model back first: tuckaway.materialize(model)",
        )
    fetched: dict[int, torch.Tensor] = {}
    args, kwargs = tree_map(lambda value: _fetch(value, fetched), (args, kwargs))
    return func(*args, **kwargs)


class _AwayParameter(_Away, nn.Parameter):
    pass


class _AwayBuffer(_Away):
    pass


class _AwayQuantized(_Away, QuantizedTensor):
    # the compiler takes it apart and puts it together again to see what it is: it must come out as it went in
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names, context = super().__tensor_flatten__()
        return names, (context, self._home)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor], context: Any, size: Any, stride: Any
    ) -> QuantizedTensor:
        context, home = context
        away = _AwayQuantized(
            QuantizedTensor.__tensor_unflatten__(inner, context, size, stride), dtype=context[1]
        )
        away._home = home
        return away

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read it, and return it as a plain tensor."""
        value = _fetch(self, {})
        assert isinstance(value, QuantizedTensor)
        return value.dequantize(dtype)


def _stays_away(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell ``.to("meta")`` from a move to where values are."""
    asked = [*args[1:], *kwargs.values()]
    if name == "type":
        return not asked
    return name == "to" and any(str(value) == "meta" for value in asked)


def _only_casts(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell a cast to another float dtype, which waits until the values are asked for."""
    if name in ("float", "half", "bfloat16"):
        return True
    asked = [*args[1:], *kwargs.values()]
    return (
        name == "to" and len(asked) == 1 and isinstance(asked[0], torch.dtype) and asked[0].is_floating_point
    )


def _set_data(away: _Away, value: torch.Tensor) -> None:
    """Take other values, in the dtype that the page has: peft casts every parameter to fp32 before training."""
    if isinstance(value, _Away) and value._home == away._home:
        return
    paging, name = away._home[0](), away._home[1]
    if paging is None:
        raise PagingError(f"{name!r} was paged, and its model is gone")
    paging.write(name, value)


def _writes(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _fetch(value: Any, fetched: dict[int, torch.Tensor]) -> Any:
    if not isinstance(value, _Away):
        return value
    if id(value) not in fetched:
        paging, name = value._home[0](), value._home[1]
        if paging is None:
            raise PagingError(f"{name!r} was paged, and its model is gone")
        with torch._C.DisableTorchFunctionSubclass():
            tensor = paging.fetch(name, requires_grad=value.requires_grad)
            fetched[id(value)] = tensor.to(value.dtype)
    return fetched[id(value)]
