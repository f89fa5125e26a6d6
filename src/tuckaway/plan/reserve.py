"""Bytes that a forward takes beside the weights, estimated from a model's configuration: :func:`estimate_reserve`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tuckaway.plan.ties import named_tensors
from tuckaway.tensor import TensorSpec

__all__ = ["Reserve", "estimate_reserve"]

_WORKSPACE = 32 * 2**20
"""Bytes of cuBLAS' workspace on a Hopper GPU, which torch allocates at the first product; 8.1 MiB on older ones."""

_HIDDEN_COPIES = 8
"""Tensors ``[batch, length, hidden]`` alive at once in a decoder layer: residual, normed, query, key, value, output of
attention, of its projection, and one on its way to fp32 in the norm (which counts double)."""

_INNER_COPIES = 3
"""Tensors ``[batch, length, inner]`` alive at once: gate, up, and their product."""


@dataclass(frozen=True)
class Reserve:
    """What one forward needs free on the executing device, in bytes.

    Args:
        cache_bytes: keys and values of all layers, for the whole length.
        activations_bytes: tensors alive at once while the prompt is read, logits of every position included.
        workspace_bytes: the matrix library's.
        decoding_bytes: a weight decoded for a product with many rows, the largest.
    """

    cache_bytes: int
    activations_bytes: int
    workspace_bytes: int
    decoding_bytes: int

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.cache_bytes + self.activations_bytes + self.workspace_bytes + self.decoding_bytes


def estimate_reserve(
    model: nn.Module,
    specs: Mapping[str, TensorSpec] | None = None,
    *,
    batch_size: int = 1,
    sequence_length: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
    accelerator: bool = True,
) -> Reserve:
    """Estimate what a forward over ``sequence_length`` tokens needs beside the weights.

    From ``model.config`` where there is one (transformers' names); else from the widest weights.

    Args:
        model: its tensors may be on the meta device.
        specs: final form of every tensor: quantized weights are decoded for products of many rows.
        batch_size: sequences at once.
        sequence_length: tokens of prompt and answer together.
        dtype: dtype that is computed in.
        accelerator: whether an accelerator executes, whose matrix library has a workspace.

    Example:
        >>> estimate_reserve(nn.Linear(1024, 4096), sequence_length=10, accelerator=False).cache_bytes
        0
    """
    config = _text_config(getattr(model, "config", None))
    tokens = batch_size * sequence_length
    matrices = [t.shape for _, t in named_tensors(model) if t.dim() == 2]
    hidden = _int(config, "hidden_size", "n_embd", "d_model") or min((min(s) for s in matrices), default=0)
    widest = max((max(s) for s in matrices), default=0)
    inner = _int(config, "intermediate_size", "n_inner", "ffn_dim", "d_ff")
    inner = inner or (4 * hidden if config else widest)
    vocabulary = _int(config, "vocab_size") if config else 0
    layers = _int(config, "num_hidden_layers", "n_layer", "num_layers") if config else 0
    heads = _int(config, "num_attention_heads", "n_head") or 1
    key_heads = _int(config, "num_key_value_heads") or heads
    head = _int(config, "head_dim") or hidden // heads
    # keys and values may be 0 layers deep: an encoder keeps none
    caches = bool(config) and getattr(config, "use_cache", True) is not False
    cache = 2 * layers * tokens * key_heads * head * dtype.itemsize if caches else 0
    attention = tokens * (heads * head + 2 * key_heads * head)
    live = tokens * ((_HIDDEN_COPIES + 2) * hidden + _INNER_COPIES * inner + vocabulary) + attention
    # of a stack of experts one is decoded at a time
    quantized = [math.prod(spec.shape[-2:]) for spec in (specs or {}).values() if spec.layout is not None]
    largest = max(quantized, default=0)
    return Reserve(
        cache,
        live * dtype.itemsize,
        _WORKSPACE if accelerator else 0,
        largest * dtype.itemsize if accelerator else 0,
    )


def _text_config(config: Any) -> Any:
    """The configuration of the language model within one of several kinds of input; of any other model its own."""
    inner = getattr(config, "text_config", None)
    return config if inner is None else inner


def _int(config: Any, *names: str) -> int:
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0
