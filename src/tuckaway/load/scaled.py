"""Eight-bit floats that are stored with scales, as DeepSeek's and vLLM's checkpoints have them: decoded on arrival.

======================  ==========================================  ================================================
``weight_scale_inv``    fp32 ``[ceil(N / 128), ceil(K / 128)]``     of a square of 128 x 128 weights (DeepSeek)
``weight_scale``        fp32 ``[]`` or ``[1]``, ``[N, 1]``          of the tensor, or of a row (compressed-tensors)
======================  ==========================================  ================================================

Either way a weight is its code times its scale, whatever ``inv`` says. Scales of activations go unused.
"""

from __future__ import annotations

import math
from collections.abc import Container

import torch
from typing_extensions import override

from tuckaway.errors import ShapeMismatch
from tuckaway.load.sinks import Sink

__all__ = ["SCALE", "ScaledSink", "scales_of"]

SCALE = "scale"
"""Name of the component of a feed that is read for its weight, not for itself."""

_BLOCK = 128  # what a dimension is divided by where the shapes allow several sizes


def scales_of(name: str, names: Container[str]) -> tuple[str | None, set[str]]:
    """Return the name of the scales of an 8-bit float tensor, and all names that have no use but for it.

    >>> scales_of("up.weight", {"up.weight", "up.weight_scale_inv", "up.input_scale"})[0]
    'up.weight_scale_inv'
    """
    prefix = name.removesuffix("weight")
    scale = next((key for key in (f"{name}_scale_inv", f"{name}_scale") if key in names), None)
    idle = [f"{prefix}{own}" for own in ("input_scale", "activation_scale", "input_scale_ub")]
    used = {key for key in idle if key in names}
    return scale, used if scale is None else used | {scale}


class ScaledSink(Sink):
    """Multiplies codes by their scales and hands them on as fp32.

    Args:
        inner: takes the decoded pieces.
        scale: of any float dtype; as many dimensions as ``shape``, or one element, or one a row.
        shape: shape of the tensor as it is stored.
        device: where the work is done.

    Raises:
        ShapeMismatch: the scales do not fit the shape.
    """

    def __init__(
        self, inner: Sink, scale: torch.Tensor, shape: tuple[int, ...], device: torch.device
    ) -> None:
        self.inner = inner
        self.whole = inner.whole
        self.cols = max(shape[-1], 1) if shape else 1
        self.align = math.lcm(inner.align, self.cols)
        self.shape = shape
        self.device = device
        scale = scale.to(device=device, dtype=torch.float32)
        if scale.numel() == 1:
            scale = scale.reshape((1,) * len(shape))
        elif scale.dim() < len(shape):
            scale = scale.reshape(*scale.shape, *(1,) * (len(shape) - scale.dim()))
        self.blocks = _blocks(tuple(scale.shape), shape)
        self.scale = scale.reshape(-1, scale.shape[-1]) if shape else scale.reshape(1, 1)
        self.leading = tuple(scale.shape[:-1])

    @override
    def write(self, start: int, piece: torch.Tensor) -> None:
        rows = piece.numel() // self.cols
        index = torch.arange(start // self.cols, start // self.cols + rows, device=self.device)
        scale = self.scale[self._scale_row(index)].repeat_interleave(self.blocks[-1], 1)[:, : self.cols]
        values = piece.to(self.device, non_blocking=True).to(torch.float32).view(rows, self.cols)
        self.inner.write(start, values.mul_(scale).view(-1))

    def _scale_row(self, row: torch.Tensor) -> torch.Tensor:
        """Return which row of the scales belongs to each row of the tensor, both with all leading dimensions as one."""
        found, step = torch.zeros_like(row), 1
        for size, block, count in zip(
            reversed(self.shape[:-1]), reversed(self.blocks[:-1]), reversed(self.leading), strict=True
        ):
            found += (row % size // block).clamp(max=count - 1) * step
            row, step = row // size, step * count
        return found

    @override
    def finish(self) -> None:
        self.inner.finish()


def _blocks(scale: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many neighbours along each dimension share a scale."""
    if not shape:
        return (1,)
    found = []
    for count, size in zip(scale, shape, strict=False):
        if count == 1:
            found.append(max(size, 1))
        elif count == math.ceil(size / _BLOCK):
            found.append(_BLOCK)
        elif count and size % count == 0:
            found.append(size // count)
    if len(found) != len(shape) or len(scale) != len(shape):
        raise ShapeMismatch(
            f"scales of shape {list(scale)} do not fit a tensor of shape {list(shape)}",
            hint="the checkpoint's 8-bit floats are of a kind that is not known",
        )
    return tuple(found)
