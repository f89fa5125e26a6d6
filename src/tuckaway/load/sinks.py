"""Where the pieces of a checkpoint's tensor go: cast, quantized or copied, straight into their final bytes.

A sink never holds more than a piece beyond what it fills. It works on the device of the components it was given, so
on a GPU the cast and the quantization happen after the copy.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from typing_extensions import override

from tuckaway.formats import Components, Emit, PieceQuantizer, format_of
from tuckaway.load.finite import NonFinite
from tuckaway.tensor import TensorSpec

__all__ = ["CopySink", "PlainSink", "QuantizeSink", "Sink", "TransposedSink", "sink_for"]

_HALF_LIMIT = 65520.0
"""From here on a value is infinite in fp16, which int8 rows are cast to first."""

_STRIP_BYTES = 16 * 2**20
"""Decoded bytes that a transposing sink works on at once."""


class Sink(Protocol):
    """Takes the elements of one source tensor, in order."""

    align: int
    """A piece starts on a multiple of this many elements."""
    whole: bool
    """The tensor must come in one piece."""

    def write(self, start: int, piece: torch.Tensor) -> None:
        """Take the 1-D ``piece`` that begins at element ``start`` of the source tensor."""

    def finish(self) -> None:
        """All pieces were written."""


class PlainSink(Sink):
    """Fills a plain tensor, casting to its dtype."""

    align, whole = 1, False

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target.view(-1)

    @override
    def write(self, start: int, piece: torch.Tensor) -> None:
        part = self.target[start : start + piece.numel()]
        if part.device != piece.device:
            # the bus carries the stored dtype; the cast runs over there
            piece = piece.to(part.device, non_blocking=True)
        part.copy_(piece)

    @override
    def finish(self) -> None:
        """Nothing is left to do."""


class CopySink(Sink):
    """Fills one component of an already quantized tensor; codes may be stored as any dtype of the same bytes."""

    align, whole = 1, False

    def __init__(self, target: torch.Tensor, stored_dtype: torch.dtype) -> None:
        self.as_bytes = target.dtype.itemsize == 1 and stored_dtype != target.dtype
        self.itemsize = stored_dtype.itemsize if self.as_bytes else 1
        self.target = target.view(-1)

    @override
    def write(self, start: int, piece: torch.Tensor) -> None:
        if self.as_bytes:
            piece, start = piece.view(self.target.dtype), start * self.itemsize
            piece = piece[: max(self.target.numel() - start, 0)]
        self.target[start : start + piece.numel()].copy_(piece, non_blocking=True)

    @override
    def finish(self) -> None:
        """Nothing is left to do."""


class QuantizeSink(Sink):
    """Quantizes on arrival. The weight is first cast to the dtype it is seen in, as bitsandbytes' users have it."""

    whole = False

    def __init__(
        self, quantizer: PieceQuantizer, align: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.quantizer = quantizer
        self.align = align
        self.dtype = dtype
        self.device = device
        self.non_finite = NonFinite()

    @override
    def write(self, start: int, piece: torch.Tensor) -> None:
        if self.device != piece.device:
            piece = piece.to(self.device, non_blocking=True)
        piece = piece.to(self.dtype)
        self.non_finite.add(piece)
        self.quantizer.write(start, piece)

    @override
    def finish(self) -> None:
        self.quantizer.finish()


class TransposedSink(QuantizeSink):
    """Quantizes a tensor that is stored transposed: blocks of weights run across the rows of the source.

    The source comes whole, and is turned and quantized in strips.
    """

    whole = True

    def __init__(
        self,
        quantizer: PieceQuantizer,
        align: int,
        dtype: torch.dtype,
        device: torch.device,
        shape: tuple[int, ...],
    ) -> None:
        super().__init__(quantizer, align, dtype, device)
        self.shape = shape

    @override
    def write(self, start: int, piece: torch.Tensor) -> None:
        if self.device != piece.device:
            piece = piece.to(self.device, non_blocking=True)
        source = piece.view(-1, *self.shape[-2:])
        _, cols, rows = source.shape  # the source is [cols, rows], the stored tensor [rows, cols]
        step = strip_rows(rows, cols, self.align)
        if len(source) > 1 and rows * cols % self.align:
            # a block runs on into the next matrix
            turned = source.transpose(1, 2).to(self.dtype).reshape(-1)
            self.non_finite.add(turned)
            self.quantizer.write(0, turned)
            return
        for index, matrix in enumerate(source):
            for row in range(0, rows, step):
                strip = matrix[:, row : row + step].t().to(self.dtype).contiguous().view(-1)
                self.non_finite.add(strip)
                self.quantizer.write((index * rows + row) * cols, strip)


def strip_rows(rows: int, cols: int, align: int) -> int:
    """Return how many rows make a strip: about ``_STRIP_BYTES`` in fp32, ending between blocks of weights."""
    multiple = align // math.gcd(cols, align) if cols else 1
    wanted = max(_STRIP_BYTES // max(4 * cols, 1), 1)
    return min(max(wanted // multiple, 1) * multiple, max(rows, 1))


def sink_for(spec: TensorSpec, components: Components, emit: Emit | None = None) -> Sink:
    """Return what turns the checkpoint's plain tensor into ``components`` of ``spec``.

    Args:
        spec: the tensor's final form.
        components: what is filled.
        emit: takes the codes piece by piece; then ``components`` need not have them.
    """
    layout = spec.layout
    if layout is None:
        return PlainSink(components[""])
    format = format_of(layout.format)
    quantizer, align = format.quantizer(layout, components, emit), format.piece_alignment(layout)
    device = components["absmax"].device
    sink = (
        TransposedSink(quantizer, align, spec.dtype, device, spec.shape)
        if layout.transposed
        else QuantizeSink(quantizer, align, spec.dtype, device)
    )
    if layout.format == "int8":
        sink.non_finite = NonFinite(_HALF_LIMIT)
    return sink
