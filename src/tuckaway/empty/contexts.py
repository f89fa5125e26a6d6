"""Build a model without its weights: :func:`init_empty_weights`, :func:`init_on_device`.

Parameters come to be on the meta device, whatever a constructor does to make them; buffers and other tensors keep
their values. :mod:`tuckaway.empty.deferral` says how. Both contexts concern the thread that enters them and no other,
and patch nothing: they are two of torch's modes, one for aten operations and one for Python calls.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._C import _pop_torch_dispatch_stack, _pop_torch_function_stack, _push_on_torch_function_stack
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from tuckaway.empty.deferral import Deferral, exchange
from tuckaway.empty.records import forget, recorded, remember

__all__ = ["init_empty_weights", "init_on_device", "meta_buffers", "rebuild_buffers"]

_log = logging.getLogger("tuckaway")

_TRUE = ("1", "true", "yes", "y", "t", "on")
_READERS = frozenset(
    ("numpy", "tolist", "data_ptr", "untyped_storage", "storage", "__array__", "__dlpack__", "__reduce_ex__")
)
"""Methods of a tensor that need its memory and are no aten operations."""


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Build models with all parameters on the meta device: in no time and without memory, whatever their size.

    Parameters that one constructor shares between modules stay shared. Parameters made before the context are left
    as they are. After an exception, large buffers made in the context stay on the meta device.

    Args:
        include_buffers: buffers, and every other tensor made meanwhile, go to the meta device too. ``None``: what
            the environment says in ``ACCELERATE_INIT_INCLUDE_BUFFERS``, or no. :func:`rebuild_buffers` gets them back.

    Example:
        >>> with init_empty_weights():
        ...     model = nn.Linear(1_000_000, 1_000_000)
        >>> model.weight.device, model.weight.shape
        (device(type='meta'), torch.Size([1000000, 1000000]))
    """
    with _building(torch.device("meta"), _wanted(include_buffers)):
        yield


@contextmanager
def init_on_device(device: torch.device | str | int, include_buffers: bool | None = None) -> Iterator[None]:
    """Build models with all parameters on ``device``; on ``"meta"`` it is :func:`init_empty_weights`.

    Args:
        device: where parameters go as modules register them.
        include_buffers: tensors made without naming a device are made there too, buffers among them. ``None``: as in
            :func:`init_empty_weights`.
    """
    device = torch.device(device)
    with ExitStack() as stack:
        if device.type != "meta" and _wanted(include_buffers):
            stack.enter_context(device)
        stack.enter_context(_building(device, _wanted(include_buffers)))
        yield


def meta_buffers(model: nn.Module, persistent: bool | None = None) -> list[str]:
    """Return the names of buffers on the meta device.

    Args:
        model: any module.
        persistent: only those that are (``True``) or are not (``False``) part of the state.
    """
    names = []
    for path, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is None or not buffer.is_meta:
                continue
            if persistent is None or persistent == (name not in module._non_persistent_buffers_set):
                names.append(f"{path}.{name}" if path else name)
    return names


def rebuild_buffers(model: nn.Module, device: torch.device | str | int = "cpu") -> list[str]:
    """Give buffers that no checkpoint holds, and that are on the meta device, the values their constructor gave them.

    It does what was recorded when the model was built under :func:`init_empty_weights`.

    Args:
        model: the model to complete.
        device: where the buffers go.

    Returns:
        The names of buffers it cannot know: made on the meta device by other means.
    """
    unknown = []
    for name in meta_buffers(model, persistent=False):
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        buffer = module._buffers[own]
        values = None if buffer is None else recorded(buffer)
        if buffer is None or values is None:
            unknown.append(name)
            continue
        module._buffers[own] = values.to(device, copy=True)
        forget(buffer)
    return unknown


@dataclass(frozen=True)
class _Settings:
    device: torch.device
    include_buffers: bool

    @property
    def defers(self) -> bool:
        return self.device.type == "meta"


class _Thread(threading.local):
    """What is being built in one thread: the settings of nested contexts, innermost last."""

    def __init__(self) -> None:
        self.settings: list[_Settings] = []
        self.deferral: Deferral | None = None


_thread = _Thread()


@contextmanager
def _building(device: torch.device, include_buffers: bool) -> Iterator[None]:
    settings = _Settings(device, include_buffers)
    if _thread.deferral is not None:
        _thread.settings.append(settings)
        try:
            yield
        finally:
            _thread.settings.pop()
        return
    deferral = Deferral()
    operations, calls = _Operations(deferral), _Calls(deferral)
    functions = _get_current_function_mode_stack()
    try:
        _thread.deferral, _thread.settings = deferral, [settings]
        with operations:
            try:
                calls.__enter__()  # type: ignore[no-untyped-call]
                yield
            finally:  # not calls.__exit__, which fails when an interrupt has lost the mode
                _restore_function_modes(functions)
        failed = deferral.finish()
        if failed:
            _log.warning("%d tensors stay on the meta device: others refer to them weakly", len(failed))
    finally:
        _restore_function_modes(functions)
        while operations in _get_current_dispatch_mode_stack():
            _pop_torch_dispatch_stack(None)
        _thread.deferral = None
        _thread.settings = []
        remember(deferral.records())


def _restore_function_modes(modes: list[TorchFunctionMode]) -> None:
    """Make torch's stack of function modes what it was: an interrupt can come right before or after torch pops one.

    ``torch.nn.init`` takes the innermost mode away for the length of a call, and an interrupt between that and its
    ``try`` loses the mode; one that stayed would defer what the thread makes from then on.
    """
    if _get_current_function_mode_stack() == modes:
        return
    for _ in _get_current_function_mode_stack():
        _pop_torch_function_stack()
    for mode in modes:
        _push_on_torch_function_stack(mode)


class _Operations(TorchDispatchMode):
    """Sees every aten operation."""

    def __init__(self, deferral: Deferral) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.deferral = deferral

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler, 5 seconds, to keep it away from the method below

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        now = _thread.settings[-1]
        with torch._C.DisableTorchFunction():
            return self.deferral.run(
                func, args, kwargs or {}, defer=now.defers, stays=now.defers and now.include_buffers
            )


class _Calls(TorchFunctionMode):
    """Sees every Python call to torch: of these, the registration of parameters, and reads of memory."""

    def __init__(self, deferral: Deferral) -> None:
        super().__init__()
        self.deferral = deferral

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, torch.Tensor):
            # register_parameter asks every parameter whether it is a leaf. This is where a parameter shows itself:
            # its making is no call torch lets us see, and hooks and patches would be seen by all threads
            if getattr(func, "__self__", None) is torch.Tensor.grad_fn:
                if isinstance(first, nn.Parameter):
                    _registered(first, self.deferral)
            elif first.is_meta:
                args, kwargs = self._with_values(getattr(func, "__name__", ""), first, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_meta and result is not first:
            self.deferral.watch(result)
        return result

    def _with_values(
        self, name: str, tensor: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Keep torch from losing values on the way: what it makes of lists goes where ``tensor`` seems to be."""
        if name in _READERS:
            with torch._C.DisableTorchFunction():
                self.deferral.make_real(tensor)
        elif name in ("__getitem__", "__setitem__"):
            args = (tensor, _index(args[1]), *args[2:])
        elif name == "new_tensor" and kwargs.get("device") is None and _thread.settings[-1].defers:
            kwargs = {**kwargs, "device": "cpu"}
        return args, kwargs


def _index(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_index, value))
    return torch.tensor(value) if isinstance(value, list) else value


def _registered(parameter: nn.Parameter, deferral: Deferral) -> None:
    """Take a parameter to its device, the object itself, so that every name and list that has it keeps it."""
    device = _thread.settings[-1].device
    with torch._C.DisableTorchFunction(), deferral.resting():
        if parameter.is_meta:
            deferral.drop(parameter)
            return
        if is_lazy(parameter):
            if device.type == "meta":
                exchange(parameter, type(parameter)(parameter.requires_grad, device, parameter.dtype))
            return
        if parameter.device == device or not deferral.made_here(parameter):
            return
        moved = parameter.detach().to(device)
        if type(moved) is torch.Tensor:
            moved = torch.Tensor._make_subclass(type(parameter), moved, parameter.requires_grad)
        else:
            moved.requires_grad_(parameter.requires_grad)
            moved._is_param = True
        if not exchange(parameter, moved):
            _log.warning(
                "a parameter of shape %s stays real: others refer to it weakly", list(parameter.shape)
            )


def _wanted(include_buffers: bool | None) -> bool:
    if include_buffers is None:
        return os.environ.get("ACCELERATE_INIT_INCLUDE_BUFFERS", "").strip().lower() in _TRUE
    return include_buffers
