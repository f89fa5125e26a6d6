"""Calls on a :class:`~tuckaway.tensor.QuantizedTensor` that are caught whole, before autograd and dispatch.

``F.linear`` is here for speed: below, it would be a transpose, two views and an ``addmm``, each through Python.
``weight.data = value`` is here because no aten operation sees it: torch would exchange the wrapper's (empty) storage
and leave the components as they were, so peft's ``merge(safe_merge=True)`` would silently change nothing.

Keys compare with ``==``: ``torch.Tensor.data.__set__`` is a new object at every access.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F

from tuckaway.formats import BoundLinear, format_of
from tuckaway.tensor.quantized import FUNCTIONS, QuantizedTensor, same_kind

__all__: list[str] = []


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if type(weight) is not QuantizedTensor or isinstance(input, QuantizedTensor):
        return NotImplemented
    # nothing here asks the weight for what torch overrides (its dim() alone was 0.9 us of the call's 2.7)
    linear = weight._bound_linear or _bind(weight)
    if linear is None:
        return NotImplemented
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(kind := input.device.type):
        input = input.to(torch.get_autocast_dtype(kind))
    with torch._C.DisableTorchFunctionSubclass():
        return linear(input, bias)


def _bind(weight: QuantizedTensor) -> BoundLinear | None:
    """Keep with a matrix what ``F.linear`` on it does, all but the input settled; None if the weight is none."""
    if weight.dim() != 2:
        return None
    layout = weight.layout_info
    bound = format_of(layout.format).bound_linear(weight.components, layout, not layout.transposed)
    weight._bound_linear = bound
    return bound


def _set_data(tensor: Any, value: Any) -> Any:
    if not isinstance(tensor, QuantizedTensor):
        return NotImplemented
    if isinstance(value, QuantizedTensor):
        _adopt(tensor, value)
    elif value.device != tensor.device:
        raise RuntimeError("a quantized weight cannot take data on another device; move the weight first")
    else:
        tensor.requantize_(value)
    return None


def _adopt(tensor: QuantizedTensor, value: QuantizedTensor) -> None:
    """Give ``tensor`` the components of ``value``, and its dtype and device with them."""
    fresh = QuantizedTensor(value.components, value.layout_info, dtype=value.dtype)
    torch.utils.swap_tensors(tensor, same_kind(tensor, fresh))


def _is_complex(tensor: Any) -> Any:
    # the one call in Python before DataParallel's broadcast, which would read a wrapper's storage: there is none
    if sys._getframe(2).f_code.co_name == "_handle_complex":
        raise RuntimeError(
            "DataParallel cannot copy quantized weights to other GPUs. Spread the model's blocks over them instead: "
            "load it with device_map='balanced'"
        )
    return NotImplemented


FUNCTIONS[F.linear] = _linear
FUNCTIONS[torch.Tensor.is_complex] = _is_complex
FUNCTIONS[torch.Tensor.data.__set__] = _set_data  # type: ignore[attr-defined]
