"""How one parameter or buffer of a model finally lies in memory: :class:`TensorSpec`.

The planner counts bytes with it, paging lays out pages with it, the loader binds tensors with it: all before, or
without, anything being allocated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tuckaway.formats import Components, Layout, Shape, Specs, format_of
from tuckaway.tensor.quantized import QuantizedTensor

__all__ = ["TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """The final form of one tensor of a model.

    Args:
        shape: shape that torch sees.
        dtype: dtype that torch sees.
        layout: how it is quantized; ``None``: a plain tensor.
        requires_grad: whether the parameter wants a gradient (never a quantized one).
        is_buffer: a buffer, not a parameter.
        persistent: part of the ``state_dict`` (parameters always are).
    """

    shape: Shape
    dtype: torch.dtype
    layout: Layout | None = None
    requires_grad: bool = False
    is_buffer: bool = False
    persistent: bool = True

    def components(self) -> Specs:
        """Return shape and dtype of every tensor that holds it; a plain tensor is its own one component, ``""``."""
        if self.layout is None:
            return {"": (self.shape, self.dtype)}
        return format_of(self.layout.format).component_specs(self.layout)

    @property
    def nbytes(self) -> int:
        """Exact size in bytes, scales included, padding between tensors not."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.components().values())

    def build(self, components: Components) -> torch.Tensor:
        """Make the tensor that a module holds, around the given components; nothing is copied."""
        data = (
            components[""]
            if self.layout is None
            else QuantizedTensor(components, self.layout, dtype=self.dtype)
        )
        if self.is_buffer:
            return data
        return torch.nn.Parameter(data, requires_grad=self.requires_grad and self.layout is None)

    def empty(self, device: torch.device | str) -> Components:
        """Return uninitialized components on ``device``; on ``"meta"`` they take no memory."""
        return {
            key: torch.empty(shape, dtype=dtype, device=device)
            for key, (shape, dtype) in self.components().items()
        }

    @classmethod
    def of(cls, tensor: torch.Tensor, *, is_buffer: bool = False, persistent: bool = True) -> TensorSpec:
        """Describe a tensor as it is."""
        layout = tensor.layout_info if isinstance(tensor, QuantizedTensor) else None
        return cls(tuple(tensor.shape), tensor.dtype, layout, tensor.requires_grad, is_buffer, persistent)


def components_of(tensor: torch.Tensor) -> Components:
    """Return the tensors that hold ``tensor``: its components, or itself under the name ``""``."""
    return tensor.components if isinstance(tensor, QuantizedTensor) else {"": tensor.detach()}
