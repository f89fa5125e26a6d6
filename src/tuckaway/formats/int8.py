"""int8 rows, as LLM.int8() has them (arXiv 2208.07339): one scale a row of the stored matrix.

Bytes and keys are those of bitsandbytes' ``Linear8bitLt``: ``weight`` int8 ``[N, K]``, ``SCB`` fp32 ``[N]`` beside
it, ``weight_format`` uint8 ``[]`` = 0 (row-major). Components: ``codes`` int8 as the tensor, ``absmax`` fp32
``[rows]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from typing_extensions import override

import tuckaway_kernels  # noqa: F401  (registers torch.ops.tuckaway)
from tuckaway.errors import CheckpointError
from tuckaway.formats.base import BoundLinear, Emit, Entries, Format, PieceQuantizer, Serialized, register
from tuckaway.formats.layout import Components, Layout, Shape, Specs
from tuckaway_kernels.linear_int8.bound import bind_int8

__all__ = ["Int8"]


class Int8(Format):
    """Eight-bit codes with a scale a row."""

    name = "int8"

    @override
    def component_specs(self, layout: Layout) -> Specs:
        return {"codes": (layout.shape, torch.int8), "absmax": ((layout.rows,), torch.float32)}

    @override
    def piece_alignment(self, layout: Layout) -> int:
        return max(layout.cols, 1)

    @override
    def quantizer(self, layout: Layout, components: Components, emit: Emit | None = None) -> PieceQuantizer:
        return _Int8Quantizer(layout, components, emit)

    @override
    def dequantize(self, components: Components, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
        codes = components["codes"].view(layout.rows, layout.cols)
        result: torch.Tensor = torch.ops.tuckaway.dequantize_int8(codes, components["absmax"], dtype)
        return result.view(layout.shape)

    @override
    def absmax(self, components: Components, layout: Layout) -> torch.Tensor:
        return components["absmax"]

    @override
    def linear(
        self,
        x: torch.Tensor,
        components: Components,
        layout: Layout,
        bias: torch.Tensor | None,
        transpose: bool,
    ) -> torch.Tensor:
        return self.bound_linear(components, layout, transpose)(x, bias)

    @override
    def bound_linear(self, components: Components, layout: Layout, transpose: bool) -> BoundLinear:
        op = torch.ops.tuckaway.linear_int8.default
        codes, absmax = components["codes"].view(layout.rows, layout.cols), components["absmax"]
        # LLM.int8() quantizes rows of x along the dimension that rows of W run along; x @ S has no such product
        threshold = layout.int8_threshold if transpose else None
        compute_dtype = layout.compute_dtype
        direct = None
        if transpose and codes.device.type == "cuda" and type(codes) is torch.Tensor:  # not a compiler's fake
            direct = bind_int8(codes, absmax, threshold, compute_dtype)

        def linear(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            if direct is not None and (done := direct(x, bias)) is not None:
                return done
            result: torch.Tensor = op(x, codes, absmax, bias, threshold, transpose, compute_dtype or x.dtype)
            return result

        return linear

    @override
    def embedding(
        self, index: torch.Tensor, components: Components, layout: Layout, dtype: torch.dtype
    ) -> torch.Tensor:
        codes = components["codes"].view(layout.rows, layout.cols)
        result: torch.Tensor = torch.ops.tuckaway.embedding_int8(index, codes, components["absmax"], dtype)
        return result

    @override
    def grouped_linear(
        self,
        x: torch.Tensor,
        components: Components,
        layout: Layout,
        offs: torch.Tensor,
        transpose: bool,
    ) -> torch.Tensor:
        # weight-only, whatever the threshold: outliers of one token are none of its neighbour's in another group
        result: torch.Tensor = torch.ops.tuckaway.grouped_linear_int8(
            x, components["codes"], components["absmax"], offs, transpose, layout.compute_dtype or x.dtype
        )
        return result

    @override
    def gather(
        self, components: Components, layout: Layout, index: torch.Tensor
    ) -> tuple[Components, Layout] | None:
        parts, flat = layout.shape[0], index.reshape(-1)
        shape = (*index.shape, *layout.shape[1:])
        found = {
            "codes": components["codes"].index_select(0, flat).view(shape),
            "absmax": components["absmax"].view(parts, -1).index_select(0, flat).view(-1),
        }
        return found, layout.with_shape(shape)

    @override
    def narrow(
        self, components: Components, layout: Layout, start: int, shape: Shape
    ) -> tuple[Components, Layout] | None:
        count, cols = math.prod(shape), max(layout.cols, 1)
        if start % cols or count % cols or shape[-1] != layout.cols:
            return None
        part = {
            "codes": components["codes"].view(-1)[start : start + count].view(shape),
            "absmax": components["absmax"][start // cols : (start + count) // cols],
        }
        return part, replace(layout, shape=tuple(shape))

    @override
    def serialize(self, name: str, components: Components, layout: Layout) -> Components:
        scales, kind = _keys(name)
        return {
            name: components["codes"],
            scales: components["absmax"],
            kind: torch.zeros((), dtype=torch.uint8),
        }

    @override
    def find(self, name: str, entries: Entries, read: Callable[[str], torch.Tensor]) -> Serialized | None:
        entry = entries.get(name)
        if entry is None or entry.dtype != torch.int8:
            return None
        scales, kind = _keys(name)
        if scales not in entries:
            return None
        layout = Layout(format=self.name, shape=tuple(entry.shape), dtype=torch.float16)
        found = entries[scales]
        if math.prod(found.shape) != layout.rows or not found.dtype.is_floating_point:
            raise CheckpointError(
                f"{list(found.shape)} {found.dtype} does not hold the scales of {layout.rows} rows",
                where=scales,
            )
        if kind in entries and math.prod(entries[kind].shape) != 1:
            raise CheckpointError(f"{list(entries[kind].shape)} names no format", where=kind)
        if kind in entries and (tiled := int(read(kind).item())) != 0:
            raise CheckpointError(
                f"int8 weights in the tiled format {tiled}",
                where=kind,
                hint="save the checkpoint with bitsandbytes 0.45 or newer, which writes row-major weights",
            )
        present = frozenset(k for k in (name, scales, kind) if k in entries)
        return Serialized(layout, {"codes": name, "absmax": scales}, {}, present)


def _keys(name: str) -> tuple[str, str]:
    """Names of the scales and of the format's number: beside ``weight``, below a parameter of another name."""
    path, _, own = name.rpartition(".")
    prefix = name if own != "weight" else path
    return (f"{prefix}.SCB", f"{prefix}.weight_format") if prefix else ("SCB", "weight_format")


class _Int8Quantizer(PieceQuantizer):
    def __init__(self, layout: Layout, components: Components, emit: Emit | None) -> None:
        self.cols = max(layout.cols, 1)
        self.codes = components["codes"].view(-1) if emit is None else None
        self.emit = emit
        self.absmax = components["absmax"]
        self.written = False

    @override
    def write(self, start: int, piece: torch.Tensor) -> None:
        self.written |= piece.numel() > 0
        rows = piece.numel() // self.cols
        first = start // self.cols
        if self.codes is not None:
            codes = self.codes[start : start + piece.numel()]
        else:
            codes = torch.empty(piece.numel(), dtype=torch.int8, device=piece.device)
        torch.ops.tuckaway.quantize_int8_out(
            piece.view(rows, self.cols),
            codes.view(rows, self.cols),
            self.absmax[first : first + rows],
        )
        if self.emit is not None:
            self.emit(start, codes)

    @override
    def finish(self) -> None:
        if not self.written:
            self.absmax.zero_()  # rows of no weights: no piece ever came


register(Int8())
