"""peft on paged models: :func:`adapt`.

peft finds quantized layers, trains on them, merges into them and saves adapters without help: a quantized weight is an
ordinary parameter of an ordinary ``nn.Linear``. Of a paged model it asks two things that only tuckaway can answer:
which device an adapter belongs on, and what its layer's weight is (DoRA wants its norm), when that weight is away; and
whether accelerate is to place the model anew once an adapter is loaded (it is not: pages stay where they are).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn

from tuckaway.integrations.wrapping import wrap
from tuckaway.paging import PageHook, paging_of
from tuckaway.tensor import QuantizedTensor

__all__ = ["adapt"]


def adapt() -> None:
    """Teach peft about pages; once or often."""
    from peft.peft_model import PeftModel
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    for tuner in _subclasses(BaseTuner):
        if "_create_and_replace" in tuner.__dict__:
            wrap(tuner, "_create_and_replace", _with_weights)
    for name in ("merge", "unmerge"):
        wrap(ParamWrapper, name, _written_back)
    wrap(BaseTunerLayer, "_move_adapter_to_device_of_base_layer", _to_execution_device)
    wrap(PeftModel, "load_adapter", _in_place)
    wrap(PeftModel, "from_pretrained", _in_place_of_class)


def _with_weights(original: Any) -> Any:
    @functools.wraps(original)
    def create(
        self: Any, config: Any, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        with _brought_in(target):
            return original(self, config, adapter_name, target, *args, **kwargs)

    return create


def _written_back(original: Any) -> Any:
    """Peft writes back what it merged into an offloaded layer, but not through wrappers around wrappers."""

    @functools.wraps(original)
    def change(self: Any, *args: Any, **kwargs: Any) -> Any:
        hook, base = _hook_of(self), _base_of(self)
        if hook is None:
            return original(self, *args, **kwargs)
        with _brought_in(self):
            result = original(self, *args, **kwargs)
            changed = {name: parameter.detach() for name, parameter in base.named_parameters()}
        hook.weights_map = changed  # a page that is in use cannot be replaced
        return result

    return change


def _to_execution_device(original: Any) -> Any:
    @functools.wraps(original)
    def move(self: Any, adapter_name: str, device: torch.device | None = None) -> Any:
        if device is None:
            hook = _hook_of(self)
            if hook is not None and hook.execution_device is not None:
                device = torch.device(hook.execution_device)
        return original(self, adapter_name, device)

    return move


def _in_place(original: Any) -> Any:
    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _no_device_map(self.get_base_model()):
            return original(self, *args, **kwargs)

    return load_adapter


def _in_place_of_class(original: classmethod[Any, Any, Any]) -> Any:
    function = original.__func__

    @functools.wraps(function)
    def from_pretrained(cls: type, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _no_device_map(model):
            return function(cls, model, *args, **kwargs)

    return classmethod(from_pretrained)


def _base_of(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _hook_of(layer: nn.Module) -> PageHook | None:
    hook = _base_of(layer).__dict__.get("_hf_hook")
    return hook if isinstance(hook, PageHook) and hook.offload else None


@contextmanager
def _brought_in(layer: nn.Module) -> Iterator[None]:
    """Have a paged layer's weights in, on the device that executes."""
    hook = _hook_of(layer)
    if hook is None:
        yield
        return
    base = _base_of(layer)
    hook.pre_forward(base)
    try:
        yield
    finally:
        hook.post_forward(base, None)


def _subclasses(kind: Any) -> Iterator[Any]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


@contextmanager
def _no_device_map(model: nn.Module) -> Iterator[None]:
    """Hide the device map that peft would place the model by, when accelerate did not place it."""
    if "hf_device_map" not in model.__dict__ or not _placed_by_tuckaway(model):
        yield
        return
    device_map = model.__dict__.pop("hf_device_map")
    try:
        yield
    finally:
        model.hf_device_map = device_map


def _placed_by_tuckaway(model: nn.Module) -> bool:
    if paging_of(model) is not None:
        return True
    hooks = (module.__dict__.get("_hf_hook") for module in model.modules())
    if any(isinstance(hook, AlignDevicesHook) and not isinstance(hook, PageHook) for hook in hooks):
        return False
    return any(isinstance(parameter, QuantizedTensor) for parameter in model.parameters())
