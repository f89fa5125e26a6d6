"""A quantized tensor's :class:`Layout`: everything about it but its bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

__all__ = ["Layout"]

Shape = tuple[int, ...]
Components = dict[str, torch.Tensor]
Specs = dict[str, tuple[Shape, torch.dtype]]


@dataclass(frozen=True)
class Layout:
    """How the components of one quantized tensor are to be read; hashable, so that compiled code can depend on it.

    Args:
        format: name of the format, a key of the registry.
        shape: shape as *stored*, row-major. Blocks of weights run along its last dimension.
        dtype: dtype of the weight when it was quantized; what ``dequantize()`` gives and a checkpoint records.
        blocksize: weights that share one scale (4-bit formats; 0 for int8, whose scales belong to rows).
        nested: the scales are quantized too.
        transposed: the tensor that torch sees is the stored one with its last two dimensions swapped.
        compute_dtype: dtype of products; ``None``: the input's.
        int8_threshold: outlier threshold of LLM.int8(); ``None``: weight-only.
    """

    format: str
    shape: Shape
    dtype: torch.dtype
    blocksize: int = 0
    nested: bool = False
    transposed: bool = False
    compute_dtype: torch.dtype | None = None
    int8_threshold: float | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def logical_shape(self) -> Shape:
        """The shape torch sees."""
        if not self.transposed:
            return self.shape
        return (*self.shape[:-2], self.shape[-1], self.shape[-2])

    @property
    def rows(self) -> int:
        """Rows of the stored tensor seen as a matrix ``[rows, cols]``."""
        return math.prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        """Length of a stored row."""
        return self.shape[-1] if self.shape else 1

    def with_shape(self, shape: Shape) -> Layout:
        """Return the same layout for another stored shape."""
        return replace(self, shape=tuple(shape))

    def flipped(self) -> Layout:
        """Return the layout of the tensor with its last two dimensions swapped: the same bytes, read the other way."""
        return replace(self, transposed=not self.transposed)
