"""Budgets that spread a model evenly over several accelerators: :func:`get_balanced_memory`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tuckaway.plan.device_map import class_names
from tuckaway.plan.memory import Device, MaxMemory, get_max_memory
from tuckaway.plan.sizes import compute_module_sizes
from tuckaway.tensor import TensorSpec

__all__ = ["get_balanced_memory"]

_log = logging.getLogger("tuckaway")


def get_balanced_memory(
    model: nn.Module,
    max_memory: MaxMemory | None = None,
    no_split_module_classes: Sequence[str] | str | None = None,
    dtype: Any = None,
    special_dtypes: Mapping[str, Any] | None = None,
    low_zero: bool = False,
    *,
    specs: Mapping[str, TensorSpec] | None = None,
) -> dict[Device, int]:
    """Return ``max_memory`` lowered so that :func:`~tuckaway.plan.infer_auto_device_map` uses all accelerators alike.

    Each gets its share of the model and a buffer: 1.25 times the larger of the largest unsplittable module and the
    mean layer. The last one keeps all it has, in case that is too tight.

    Args:
        model: its tensors may be on the meta device.
        max_memory: as in :func:`~tuckaway.plan.get_max_memory`. When it is ``None`` and there is one accelerator,
            a tenth of that is left to activations.
        no_split_module_classes: class names of modules that must lie on one device.
        dtype: as in :func:`~tuckaway.plan.infer_auto_device_map`.
        special_dtypes: as there.
        low_zero: put as little as possible on the first accelerator.
        specs: as there.
    """
    budgets = get_max_memory(max_memory)
    used = sorted(d for d, size in budgets.items() if isinstance(d, int) and size > 0)
    if not used:
        return budgets
    if len(used) == 1:
        if max_memory is None:
            budgets[used[0]] = budgets[used[0]] * 9 // 10
            _log.info("using 90%% of GPU %s; pass max_memory to use more", used[0])
        return budgets
    sizes = compute_module_sizes(model, dtype, special_dtypes, specs=specs)
    whole = class_names(no_split_module_classes)
    modules = dict(model.named_modules())
    unsplit = max((sizes.get(n, 0) for n, m in modules.items() if n and type(m).__name__ in whole), default=0)
    layers = [
        sizes.get(n, 0) for n, m in modules.items() if sizes.get(n) and not any(True for _ in m.children())
    ]
    mean = sum(layers) // max(len(layers), 1)
    share = sizes.get("", 0) // (len(used) - 1 if low_zero else len(used)) + int(1.25 * max(unsplit, mean))
    first, *others = used
    for device in used[:-1]:
        if not (low_zero and device == first):
            budgets[device] = min(share, budgets[device])
    if low_zero:
        elsewhere = sum(budgets[device] for device in others)
        budgets[first] = min(max(0, sizes.get("", 0) - elsewhere), budgets[first])
    return budgets
