"""Bytes: of every block of a model in its final form, before it exists, and of a model as it lies now."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Literal, overload

import torch
from torch import nn

from tuckaway.errors import PlanError
from tuckaway.plan.ties import ancestors, named_tensors
from tuckaway.tensor import TensorSpec, components_of

__all__ = ["compute_module_sizes", "dtype_byte_size", "memory_footprint", "tensor_sizes"]

# accelerate's CustomDtype, which exists only to count sizes
_CUSTOM_BITS = {"fp8": 8, "int4": 4, "int2": 2}


def dtype_byte_size(dtype: Any) -> float:
    """Return the bytes of one element: of a torch dtype, its name, or accelerate's ``CustomDtype``.

    Raises:
        PlanError: it is none of these.

    Example:
        >>> dtype_byte_size(torch.bfloat16), dtype_byte_size("float32"), dtype_byte_size("int4")
        (2, 4, 0.5)
    """
    if isinstance(dtype, torch.dtype):
        return dtype.itemsize
    name = str(getattr(dtype, "value", dtype)).removeprefix("torch.")
    if name in _CUSTOM_BITS:
        bits = _CUSTOM_BITS[name]
        return bits / 8 if bits % 8 else bits // 8
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise PlanError(f"{dtype!r} is no dtype")
    return found.itemsize


def tensor_sizes(
    model: nn.Module,
    specs: Mapping[str, TensorSpec] | None = None,
    *,
    dtype: Any = None,
    special_dtypes: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Return the bytes of every parameter and buffer, under each of its names, in the model's order.

    Args:
        model: its tensors may be on the meta device.
        specs: final forms; exact, and all else is ignored where a name is in it.
        dtype: what float tensors that are wider become. ``None``: they stay.
        special_dtypes: dtypes of single tensors by name; they override ``dtype``.
    """
    special = special_dtypes or {}
    width = None if dtype is None else dtype_byte_size(dtype)
    sizes = {}
    for name, tensor in named_tensors(model):
        if specs is not None and name in specs:
            sizes[name] = specs[name].nbytes
        elif name in special:
            sizes[name] = math.ceil(tensor.numel() * dtype_byte_size(special[name]))
        elif width is not None and tensor.is_floating_point() and len(components_of(tensor)) == 1:
            sizes[name] = math.ceil(tensor.numel() * min(width, tensor.dtype.itemsize))
        else:
            sizes[name] = sum(part.nbytes for part in components_of(tensor).values())
    return sizes


def compute_module_sizes(
    model: nn.Module,
    dtype: Any = None,
    special_dtypes: Mapping[str, Any] | None = None,
    buffers_only: bool = False,
    *,
    specs: Mapping[str, TensorSpec] | None = None,
) -> dict[str, int]:
    """Return the bytes at and below every module and tensor by name; ``""`` is the whole model.

    A tied tensor counts once in every module that holds it, so a parent may be less than the sum of its children.

    Args:
        model: its tensors may be on the meta device.
        dtype: as in :func:`tensor_sizes`.
        special_dtypes: as in :func:`tensor_sizes`.
        buffers_only: count buffers only.
        specs: final forms of the tensors; then sizes are exact.
    """
    bytes_of = tensor_sizes(model, specs, dtype=dtype, special_dtypes=special_dtypes)
    named = model.named_buffers(remove_duplicate=False) if buffers_only else named_tensors(model)
    sizes: dict[str, int] = defaultdict(int)
    counted: set[tuple[str, int]] = set()
    for name, tensor in named:
        for path in ancestors(name):
            if (path, id(tensor)) not in counted:
                counted.add((path, id(tensor)))
                sizes[path] += bytes_of[name]
    return sizes


@overload
def memory_footprint(model: nn.Module, by_device: Literal[False] = ...) -> int: ...
@overload
def memory_footprint(model: nn.Module, by_device: Literal[True]) -> dict[str, int]: ...


def memory_footprint(model: nn.Module, by_device: bool = False) -> int | dict[str, int]:
    """Return the bytes that a model's parameters and buffers take now, wherever they lie.

    A tied tensor counts once, a quantized one with its scales, a paged one where it is paged from (the slots it
    visits are not its own). Tensors on the meta device take nothing.

    Args:
        model: any module.
        by_device: return ``{"cuda:0": bytes, "cpu": bytes, "disk": bytes}`` instead of the sum.

    Example:
        >>> memory_footprint(nn.Linear(10, 10))
        440
    """
    totals: dict[str, int] = defaultdict(int)
    paged = dict(_paged(model))
    for _, (spec, home) in {id(entry): entry for entry in paged.values()}.items():
        totals[home] += spec.nbytes
    seen: set[tuple[str, int, int]] = set()
    for name, tensor in named_tensors(model):
        if name in paged:
            continue
        for part in components_of(tensor).values():
            # tied by `.data`, two parameters are two objects on one storage
            key = (str(part.device), part.data_ptr(), part.nbytes)
            if not part.is_meta and part.nbytes and key not in seen:
                seen.add(key)
                totals[str(part.device)] += part.nbytes
    return dict(totals) if by_device else sum(totals.values())


def _paged(model: nn.Module) -> Iterator[tuple[str, tuple[TensorSpec, str]]]:
    """Yield the tensors that paging holds, under each name, aliases with the very same entry.

    Paging leaves itself on the model; it is asked by shape, as the planner stands below it.
    """
    plan = getattr(model.__dict__.get("_tuckaway_paging"), "plan", None)
    if plan is None:
        return
    entries = {name: (plan.specs[name], page.home) for page in plan.pages for name in page.tensors}
    for name, kept in plan.canonical.items():
        if kept in entries:
            yield name, entries[kept]
