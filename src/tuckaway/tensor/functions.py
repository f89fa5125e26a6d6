"""Calls on a :class:`~tuckaway.tensor.QuantizedTensor` that are caught whole, before autograd and dispatch.

``F.linear`` is here for speed: below, it would be a transpose, two views and an ``addmm``, each through Python.
``weight.data = value`` is here because no aten operation sees it: torch would exchange the wrapper's (empty) storage
and leave the components as they were, so peft's ``merge(safe_merge=True)`` would silently change nothing.

Keys compare with ``==``: ``torch.Tensor.data.__set__`` is a new object at every access.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tuckaway.tensor.dispatch import product
from tuckaway.tensor.quantized import QuantizedTensor, same_kind

__all__ = ["FUNCTIONS"]


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, QuantizedTensor) or weight.dim() != 2 or isinstance(input, QuantizedTensor):
        return NotImplemented
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        input = input.to(torch.get_autocast_dtype(kind))
    with torch._C.DisableTorchFunctionSubclass():
        return product(input, weight, bias, transpose=True)


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


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}
