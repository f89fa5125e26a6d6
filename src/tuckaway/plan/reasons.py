"""Why a parameter is not quantized: :func:`reason_against`, the rules in the order they are asked.

Two kinds: what *cannot* be quantized, or gains nothing by it, and what is *better* left alone. The second kind gives
way to a user who names the parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tuckaway.config import QuantizationConfig
from tuckaway.tensor import TensorSpec, layout_for

__all__ = ["is_stored_transposed", "quantized_spec", "reason_against"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_THINNEST = 32
"""Rows and columns a hand-written parameter must have: fewer are tables and states (``A_log [d, 16]``), not factors."""
_WORTH_IT = 0.75
"""Share of the plain bytes a quantized tensor may take. int8 scales of 3-wide convolution rows would take 1.17."""
_TABLES = re.compile(
    r"(^|_)(bias|biases|scale|scales|norm|gamma|beta|log|tokens?|pos|position|positional|positions|embed|embeds|"
    r"embedding|embeddings|emb|anchors?)(_|$)"
)
"""Pieces of names that hand-written parameters have which are added or looked up, not multiplied with."""


def reason_against(
    module: nn.Module,
    own: str,
    tensor: torch.Tensor,
    config: QuantizationConfig,
    plain: torch.dtype | None,
    *,
    named: bool = False,
) -> str | None:
    """Return why a parameter stays unquantized, or None.

    Args:
        module: the module that holds it.
        own: its name there.
        tensor: the parameter; may be on the meta device.
        config: with the format it would get.
        plain: dtype it would have unquantized; ``None``: its own.
        named: the user asks for it by name.
    """
    reason = _cannot(module, tensor, plain)
    if reason is None and not named:
        reason = _better_not(module, own, tensor, config)
    return reason if reason is not None else _gains_nothing(module, tensor, config, plain)


def quantized_spec(spec: TensorSpec, config: QuantizationConfig, *, transposed: bool) -> TensorSpec:
    """Return the quantized form of a plain tensor."""
    shape = (*spec.shape[:-2], spec.shape[-1], spec.shape[-2]) if transposed else spec.shape
    layout = layout_for(config, shape, spec.dtype, transposed=transposed)
    return TensorSpec(spec.shape, spec.dtype, layout, requires_grad=False)


def is_stored_transposed(module: nn.Module) -> bool:
    """Tell transformers' ``Conv1D``, an ``nn.Linear`` whose weight is ``[in, out]``, without importing it."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def _cannot(module: nn.Module, tensor: torch.Tensor, plain: torch.dtype | None) -> str | None:
    if not tensor.is_floating_point():
        return f"{_short(tensor.dtype)} values"
    if (plain or tensor.dtype) not in _FLOATS or tensor.dtype.itemsize < 2:
        return f"{_short(tensor.dtype)} is quantized already or wider than fp32"
    if tensor.dim() < 2:
        return "one-dimensional"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent weights are used inside torch's own kernels"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "an embedding with max_norm writes to its weight"
    if isinstance(module, nn.EmbeddingBag):
        return "an embedding bag"
    return None


def _better_not(module: nn.Module, own: str, tensor: torch.Tensor, config: QuantizationConfig) -> str | None:
    for kinds, reason in _KINDS:
        if isinstance(module, kinds):
            found = reason(module, config) if callable(reason) else reason
            if found is not None:
                return found
    if re.search(r"Norm(\dd)?$", type(module).__name__):
        return "a norm"
    if "Router" in type(module).__name__:
        return "a router"
    if tensor.shape[0] == 1 or tensor.numel() == max(tensor.shape):
        return "a broadcast vector"
    known = isinstance(module, _MATRICES) or is_stored_transposed(module)
    if not (known and ("weight" in own or own.startswith("original"))):
        found = _hand_written(module, own, tensor)
        if found is not None:
            return found
    if tensor.numel() < config.min_weights:
        return f"fewer than {config.min_weights} weights (min_weights)"
    return None


def _gains_nothing(
    module: nn.Module, tensor: torch.Tensor, config: QuantizationConfig, plain: torch.dtype | None
) -> str | None:
    shape = tuple(tensor.shape)
    if math.prod(shape) < config.blocksize:
        return "smaller than one block of weights"
    spec = TensorSpec(shape, plain or tensor.dtype)
    made = quantized_spec(spec, config, transposed=is_stored_transposed(module))
    if made.nbytes > _WORTH_IT * spec.nbytes:
        return f"rows too short: {config.format} would not be smaller"
    return None


def _embedding(module: nn.Module, config: QuantizationConfig) -> str | None:
    return None if config.quantize_embeddings else "an embedding (quantize_embeddings is off)"


def _convolution(module: nn.Module, config: QuantizationConfig) -> str | None:
    # groups of one channel are a filter each: few weights, and every error in them stays
    return "a depthwise convolution" if module.groups > 1 and module.weight.shape[1] == 1 else None  # type: ignore[operator, index]


_MATRICES = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.Embedding, _ConvNd)

_Reason = str | Callable[[nn.Module, QuantizationConfig], str | None]
_KINDS: tuple[tuple[type | tuple[type, ...], _Reason], ...] = (
    (nn.Embedding, _embedding),
    ((nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase), "a norm"),
    (_ConvTransposeNd, "a transposed convolution"),
    (_ConvNd, _convolution),
)


def _hand_written(module: nn.Module, own: str, tensor: torch.Tensor) -> str | None:
    if getattr(tensor, "_no_weight_decay", False):
        return "marked as no weight matrix (_no_weight_decay)"
    if _TABLES.search(own.lower()):
        return "named like something added or looked up"
    if min(tensor.shape[-2:]) < _THINNEST:
        return f"fewer than {_THINNEST} rows or columns"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
