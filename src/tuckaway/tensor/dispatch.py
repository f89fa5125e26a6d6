"""What aten operations do with a :class:`~tuckaway.tensor.QuantizedTensor`: one table, below autograd.

Three kinds of entries: those that only move, copy or re-read the components (``detach``, ``_to_copy``, ``t``,
``select``), products, which have kernels, and in-place arithmetic, which quantizes anew. An operation that is not in
the table gets dequantized weights, for that one call, if it writes to none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tuckaway.formats import format_of
from tuckaway.tensor.quantized import QuantizedTensor

__all__ = ["dispatch", "product"]

aten = torch.ops.aten
_TABLE: dict[Any, Callable[..., Any]] = {}


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``func`` on arguments among which is at least one QuantizedTensor.

    Raises:
        NotImplementedError: an in-place operation that has no entry would write to a quantized weight.
    """
    handler = _TABLE.get(func) or _NAMED.get(func._schema.name)
    if handler is not None:
        result = handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
    written = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if written:
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        if any(isinstance(given.get(a.name), QuantizedTensor) for a in written):
            raise NotImplementedError(
                f"{func} writes to a quantized weight. Dequantize it first: weight = weight.dequantize()"
            )
    args, kwargs = tree_map(_plain, (args, kwargs))
    return func(*args, **kwargs)


def product(
    x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None, *, transpose: bool
) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` (``transpose``) or ``x @ weight + bias``, with the kernels of its format.

    Args:
        x: ``[..., K]`` with K the weight's last dimension (``transpose``) or its first.
        weight: ``[N, K]`` or ``[K, N]`` as torch sees it.
        bias: ``[N]`` or None.
        transpose: multiply by the transposed weight, as ``F.linear`` does.
    """
    layout = weight.layout_info
    format = format_of(layout.format)
    return format.linear(x, weight.components, layout, bias, transpose != layout.transposed)


def _plain(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


def implements(*operations: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function in the table for these operations."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for operation in operations:
            _TABLE[operation] = function
        return function

    return enter


# Copies and moves


@implements(aten.detach.default, aten.alias.default)
def _share(tensor: QuantizedTensor) -> QuantizedTensor:
    return tensor.apply_to_components(lambda t: t)


@implements(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(tensor: QuantizedTensor, size: Any) -> Any:
    return _share(tensor) if tuple(size) == tuple(tensor.shape) else NotImplemented


@implements(aten.clone.default, aten.contiguous.default)
def _clone(tensor: QuantizedTensor, *, memory_format: Any = None) -> QuantizedTensor:
    return tensor.apply_to_components(torch.clone)


@implements(aten._to_copy.default)
def _to_copy(
    tensor: QuantizedTensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    # another float dtype is only what torch sees: codes and scales stay (peft casts every parameter it finds)
    components = {
        key: part.to(device=device, non_blocking=non_blocking, copy=True)
        for key, part in tensor.components.items()
    }
    return QuantizedTensor(components, tensor.layout_info, dtype=dtype or tensor.dtype)


@implements(aten.copy_.default)
def _copy_into(target: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(target, QuantizedTensor):
        return NotImplemented
    return target.requantize_(source)


def _plain_like(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        options = {k: v for k, v in options.items() if v is not None and k != "memory_format"}
        return factory(tuple(tensor.shape), **{"dtype": tensor.dtype, "device": tensor.device, **options})

    return make


_TABLE[aten.empty_like.default] = _plain_like(torch.empty)
_TABLE[aten.zeros_like.default] = _plain_like(torch.zeros)
_TABLE[aten.ones_like.default] = _plain_like(torch.ones)
_TABLE[aten.rand_like.default] = _plain_like(torch.rand)
_TABLE[aten.randn_like.default] = _plain_like(torch.randn)


@implements(aten.new_empty.default, aten.new_zeros.default)
def _new(tensor: QuantizedTensor, size: Any, **options: Any) -> torch.Tensor:
    return _plain_like(torch.zeros)(
        torch.empty(size, dtype=tensor.dtype, device="meta"), **{"device": tensor.device, **options}
    )


# Views: the same bytes read otherwise


@implements(aten.t.default)
def _t(tensor: QuantizedTensor) -> Any:
    return _flip(tensor) if tensor.dim() == 2 else NotImplemented


@implements(aten.transpose.int)
def _transpose(tensor: QuantizedTensor, dim0: int, dim1: int) -> Any:
    last = {tensor.dim() - 1, tensor.dim() - 2}
    return _flip(tensor) if {dim0 % tensor.dim(), dim1 % tensor.dim()} == last else NotImplemented


@implements(aten.permute.default)
def _permute(tensor: QuantizedTensor, dims: Any) -> Any:
    order = [d % tensor.dim() for d in dims]
    if order == list(range(tensor.dim())):
        return _share(tensor)
    swapped = [*range(tensor.dim() - 2), tensor.dim() - 1, tensor.dim() - 2]
    return _flip(tensor) if order == swapped else NotImplemented


def _flip(tensor: QuantizedTensor) -> QuantizedTensor:
    return tensor.like(tensor.components, tensor.layout_info.flipped())


def _run(tensor: QuantizedTensor, start: int, stored_shape: tuple[int, ...]) -> Any:
    """The elements from ``start`` on as a QuantizedTensor of ``stored_shape``, if they begin and end between blocks."""
    layout = tensor.layout_info
    found = format_of(layout.format).narrow(tensor.components, layout, start, stored_shape)
    return NotImplemented if found is None else tensor.like(*found)


@implements(aten.select.int)
def _select(tensor: QuantizedTensor, dim: int, index: int) -> Any:
    layout = tensor.layout_info
    if dim % tensor.dim() != 0 or tensor.dim() < 2:
        return NotImplemented
    index = int(index) % tensor.shape[0]
    if tensor.dim() >= 3:
        rest = layout.shape[1:]
        return _run(tensor, index * math.prod(rest), rest)
    if layout.transposed:
        return NotImplemented
    row = torch.tensor([index], device=tensor.codes.device)
    return format_of(layout.format).embedding(row, tensor.components, layout, tensor.dtype)[0]


@implements(aten.slice.Tensor)
def _slice(
    tensor: QuantizedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    layout, dim = tensor.layout_info, dim % tensor.dim()
    first, last, _ = slice(start, None if end is None or end > tensor.shape[dim] else end).indices(
        tensor.shape[dim]
    )
    if step == 1 and (first, last) == (0, tensor.shape[dim]):
        return _share(tensor)
    stored_dim = dim
    if layout.transposed and dim >= tensor.dim() - 2:
        stored_dim = 2 * tensor.dim() - 3 - dim
    if step != 1 or stored_dim != 0 or last <= first or tensor.dim() < 2:
        return NotImplemented
    row = math.prod(layout.shape[1:])
    return _run(tensor, first * row, (last - first, *layout.shape[1:]))


@implements(aten.split.Tensor)
def _split(tensor: QuantizedTensor, size: int, dim: int = 0) -> Any:
    return [aten.slice.Tensor(tensor, dim, at, at + size) for at in range(0, tensor.shape[dim], size)]


@implements(aten.split_with_sizes.default)
def _split_with_sizes(tensor: QuantizedTensor, sizes: Any, dim: int = 0) -> Any:
    parts, at = [], 0
    for size in sizes:
        parts.append(aten.slice.Tensor(tensor, dim, at, at + size))
        at += size
    return parts


@implements(aten.unbind.int)
def _unbind(tensor: QuantizedTensor, dim: int = 0) -> Any:
    return [aten.select.int(tensor, dim, i) for i in range(tensor.shape[dim])]


# Products


@implements(aten.linear.default)
def _linear(x: Any, weight: Any, bias: torch.Tensor | None = None) -> Any:
    if not _is_matrix(weight) or isinstance(x, QuantizedTensor):
        return NotImplemented
    return product(x, weight, _plain(bias), transpose=True)


@implements(aten.mm.default, aten.matmul.default)
def _mm(left: Any, right: Any) -> Any:
    if _is_matrix(right):
        return product(_plain(left), right, None, transpose=False)
    if _is_matrix(left) and right.dim() == 2:
        # W @ y = (y^T @ W^T)^T
        return product(right.t(), left, None, transpose=True).t()
    return NotImplemented


@implements(aten.addmm.default)
def _addmm(bias: Any, left: Any, right: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if (
        beta == 1
        and alpha == 1
        and _is_matrix(right)
        and bias.dim() == 1
        and not isinstance(bias, QuantizedTensor)
    ):
        return product(_plain(left), right, bias, transpose=False)
    result = _mm(left, right)
    return NotImplemented if result is NotImplemented else beta * _plain(bias) + alpha * result


@implements(aten.mv.default)
def _mv(left: Any, right: Any) -> Any:
    return product(right, left, None, transpose=True) if _is_matrix(left) else NotImplemented


@implements(aten.bmm.default)
def _bmm(left: Any, right: Any) -> Any:
    """One product of groups of rows: each matrix is decoded by itself, and only then."""
    if _is_stack(right) and not isinstance(left, QuantizedTensor):
        parts, rows = left.shape[0], left.shape[1]
        product = _grouped(left.reshape(parts * rows, -1), right, _ends(parts, rows, left.device))
        return product.view(parts, rows, -1)
    if _is_stack(left) and not isinstance(right, QuantizedTensor):
        # W @ y = (y^T @ W^T)^T
        turned = _bmm(right.transpose(1, 2), _flip(left))
        return turned if turned is NotImplemented else turned.transpose(1, 2)
    return NotImplemented


@implements(aten.baddbmm.default)
def _baddbmm(bias: Any, left: Any, right: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    result = _bmm(left, right)
    return result if result is NotImplemented else beta * _plain(bias) + alpha * result


@implements(aten._grouped_mm.default)
def _grouped_mm(left: Any, right: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """``grouped_mm`` of rows with a stack of experts, of which only those that have rows are decoded."""
    if bias is not None or offs is None or not _is_stack(right) or left.dim() != 2:
        return NotImplemented
    result = _grouped(_plain(left), right, offs.to(torch.int32))
    return result if out_dtype is None else result.to(out_dtype)


def _grouped_mm_backward(left: Any, right: Any, offs: Any, grad: torch.Tensor) -> Any:
    """Gradients of transformers' own ``grouped_mm``: a quantized stack gets none, and zeros that take no memory."""
    if not _is_stack(right):
        return NotImplemented
    nothing = torch.zeros((), dtype=right.dtype, device=right.device).expand(right.shape)
    return _grouped(grad, _flip(right), offs.to(torch.int32)), nothing


_NAMED: dict[str, Callable[..., Any]] = {
    "transformers::grouped_mm_fallback": _grouped_mm,
    "transformers::grouped_mm_fallback_backward": _grouped_mm_backward,
}
"""Operations of libraries that may not be there; they stand in for torch's where that has none."""


def _grouped(x: torch.Tensor, stack: QuantizedTensor, offs: torch.Tensor) -> torch.Tensor:
    layout = stack.layout_info
    return format_of(layout.format).grouped_linear(x, stack.components, layout, offs, layout.transposed)


def _ends(parts: int, rows: int, device: torch.device) -> torch.Tensor:
    return torch.arange(1, parts + 1, dtype=torch.int32, device=device) * rows


@implements(aten.embedding.default)
def _embedding(weight: Any, index: torch.Tensor, *_: Any, **__: Any) -> Any:
    if not _is_matrix(weight) or weight.layout_info.transposed:
        return NotImplemented
    layout = weight.layout_info
    return format_of(layout.format).embedding(index, weight.components, layout, weight.dtype)


@implements(aten.index.Tensor)
def _index(tensor: Any, indices: Any) -> Any:
    """Rows of a matrix, or experts of a stack, by a list of numbers: only those are decoded."""
    if not isinstance(tensor, QuantizedTensor) or len(indices) != 1 or indices[0] is None:
        return NotImplemented
    layout, index = tensor.layout_info, indices[0]
    if (
        index.dtype in (torch.bool, torch.uint8)
        or tensor.dim() < 2
        or (layout.transposed and tensor.dim() == 2)
    ):
        return NotImplemented
    format = format_of(layout.format)
    if tensor.dim() == 2:
        return format.embedding(index, tensor.components, layout, tensor.dtype)
    found = format.gather(tensor.components, layout, index)
    if found is None:
        return NotImplemented
    copy = tensor.like(*found)
    copy._is_copy = True
    return copy


def _is_stack(value: Any) -> bool:
    return isinstance(value, QuantizedTensor) and value.dim() == 3


def _is_matrix(value: Any) -> bool:
    return isinstance(value, QuantizedTensor) and value.dim() == 2


# In-place arithmetic: what merging an adapter into a weight needs


def _in_place(operation: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def apply(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(tensor, QuantizedTensor):
            return NotImplemented
        if tensor._is_copy:
            raise NotImplementedError(
                "writing to a copy of quantized experts would round it; use the operation that returns a new tensor"
            )
        args, kwargs = tree_map(_plain, (args, kwargs))
        return tensor.requantize_(operation(tensor.dequantize(torch.float32), *args, **kwargs))

    return apply


_TABLE[aten.add_.Tensor] = _in_place(torch.add)
_TABLE[aten.sub_.Tensor] = _in_place(torch.sub)
_TABLE[aten.mul_.Tensor] = _in_place(torch.mul)
_TABLE[aten.div_.Tensor] = _in_place(torch.div)
_TABLE[aten.zero_.default] = _in_place(torch.zeros_like)


@implements(aten.fill_.Scalar, aten.fill_.Tensor)
def _fill(tensor: QuantizedTensor, value: Any) -> QuantizedTensor:
    return tensor.requantize_(torch.full(tensor.shape, float(value), device=tensor.device))


# Memory


@implements(aten.record_stream.default)
def _record_stream(tensor: QuantizedTensor, stream: Any) -> None:
    for part in tensor.components.values():
        aten.record_stream.default(part, stream)


@implements(aten._pin_memory.default)
def _pin(tensor: QuantizedTensor, device: Any = None) -> QuantizedTensor:
    return tensor.apply_to_components(torch.Tensor.pin_memory)


@implements(aten.is_pinned.default)
def _is_pinned(tensor: QuantizedTensor, device: Any = None) -> bool:
    return all(part.is_pinned() for part in tensor.components.values())
