"""What of a transformers model is quantized: :func:`choose`, the same for transformers' loader and for tuckaway's."""

from __future__ import annotations

import re
from typing import Any

import torch

from tuckaway.config import QuantizationConfig
from tuckaway.plan import choose_specs
from tuckaway.tensor import TensorSpec

__all__ = ["choose", "with_model_rules"]


def choose(
    model: Any, config: QuantizationConfig, dtype: torch.dtype | None, *, strict: bool
) -> dict[str, TensorSpec]:
    """Return the final form of every tensor; see :func:`~tuckaway.plan.choose_specs`."""
    specs, _ = choose_specs(model, with_model_rules(model, config, dtype), dtype=dtype, strict=strict)
    return specs


def with_model_rules(model: Any, config: QuantizationConfig, dtype: torch.dtype | None) -> QuantizationConfig:
    """Return the config with what the model's class itself keeps in fp32 (``_keep_in_fp32_modules``)."""
    plan = getattr(model, "_get_dtype_plan", None)
    patterns = [] if plan is None or dtype is None else list(plan(dtype))
    names = [name for name, _ in model.named_parameters() if any(re.search(p, name) for p in patterns)]
    if not names:
        return config
    return config.replace(keep_in_fp32_modules=[*(config.keep_in_fp32_modules or ()), *names])
