"""nf4 and fp4: two codes a byte, one scale a block of weights, the scales quantized again when nested.

Bytes and keys are those of bitsandbytes' ``Linear4bit``, so a checkpoint goes both ways. Components:

========================  =======  =========================  ====================================================
``codes``                 uint8    ``[(n + 1) // 2]``         element 2i in the high nibble of byte i
``absmax``                fp32     ``[ceil(n / blocksize)]``  uint8 when nested: codes of the scales
``nested_absmax``         fp32     ``[ceil(blocks / 256)]``   nested only: scale of 256 scales
``nested_offset``         fp32     ``[]``                     nested only: mean of all scales
========================  =======  =========================  ====================================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from typing_extensions import override

import tuckaway_kernels  # noqa: F401  (registers torch.ops.tuckaway)
from tuckaway import files
from tuckaway.errors import CheckpointError
from tuckaway.formats.base import (
    BoundLinear,
    Emit,
    Entries,
    Entry,
    Format,
    PieceQuantizer,
    Serialized,
    register,
)
from tuckaway.formats.layout import Components, Layout, Shape, Specs
from tuckaway_kernels.codebooks import codebook, dynamic_map
from tuckaway_kernels.linear_4bit.bound import bind_4bit

__all__ = ["NESTED_BLOCKSIZE", "FourBit"]

NESTED_BLOCKSIZE = 256
"""Scales that share one scale of their own; bitsandbytes writes no other."""

_MAX_COUNT = 2**63 - 1  # torch counts elements in int64
_CPU = torch.device("cpu")


class FourBit(Format):
    """A format of 16 codes, known by its codebook."""

    def __init__(self, name: str) -> None:
        self.name = name

    @override
    def component_specs(self, layout: Layout) -> Specs:
        blocks = -(-layout.numel // layout.blocksize)
        specs: Specs = {"codes": (((layout.numel + 1) // 2,), torch.uint8)}
        if not layout.nested:
            specs["absmax"] = ((blocks,), torch.float32)
            return specs
        specs["absmax"] = ((blocks,), torch.uint8)
        specs["nested_absmax"] = ((math.ceil(blocks / NESTED_BLOCKSIZE),), torch.float32)
        specs["nested_offset"] = ((), torch.float32)
        return specs

    @override
    def piece_alignment(self, layout: Layout) -> int:
        return layout.blocksize

    @override
    def quantizer(self, layout: Layout, components: Components, emit: Emit | None = None) -> PieceQuantizer:
        return _FourBitQuantizer(layout, components, emit)

    @override
    def dequantize(self, components: Components, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
        result: torch.Tensor = torch.ops.tuckaway.dequantize_4bit(
            components["codes"],
            self.absmax(components, layout),
            self.name,
            layout.blocksize,
            list(layout.shape),
            dtype,
        )
        return result

    @override
    def absmax(self, components: Components, layout: Layout) -> torch.Tensor:
        if not layout.nested:
            return components["absmax"]
        result: torch.Tensor = torch.ops.tuckaway.dequantize_nested(
            components["absmax"], components["nested_absmax"], components["nested_offset"]
        )
        return result

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
        op = torch.ops.tuckaway.linear_4bit.default
        codes, scales = components["codes"], components["absmax"]
        nested, offset = components.get("nested_absmax"), components.get("nested_offset")
        options = self.name, layout.blocksize, layout.rows, layout.cols, transpose
        compute_dtype = layout.compute_dtype
        direct = None
        if transpose and codes.device.type == "cuda" and type(codes) is torch.Tensor:  # not a compiler's fake
            direct = bind_4bit(codes, scales, nested, offset, *options[:-1], compute_dtype)

        def linear(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            if direct is not None and (done := direct(x, bias)) is not None:
                return done
            result: torch.Tensor = op(
                x, codes, scales, nested, offset, bias, *options, compute_dtype or x.dtype
            )
            return result

        return linear

    @override
    def embedding(
        self, index: torch.Tensor, components: Components, layout: Layout, dtype: torch.dtype
    ) -> torch.Tensor:
        result: torch.Tensor = torch.ops.tuckaway.embedding_4bit(
            index,
            components["codes"],
            components["absmax"],
            components.get("nested_absmax"),
            components.get("nested_offset"),
            self.name,
            layout.blocksize,
            layout.rows,
            layout.cols,
            dtype,
        )
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
        result: torch.Tensor = torch.ops.tuckaway.grouped_linear_4bit(
            x,
            components["codes"],
            components["absmax"],
            components.get("nested_absmax"),
            components.get("nested_offset"),
            offs,
            self.name,
            layout.blocksize,
            layout.shape[-2],
            layout.cols,
            transpose,
            layout.compute_dtype or x.dtype,
        )
        return result

    @override
    def gather(
        self, components: Components, layout: Layout, index: torch.Tensor
    ) -> tuple[Components, Layout] | None:
        parts, each = layout.shape[0], math.prod(layout.shape[1:])
        if each == 0 or each % layout.blocksize:
            return None
        flat, blocks = index.reshape(-1), each // layout.blocksize

        def chosen(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
            return {key: tensor.view(parts, -1).index_select(0, flat).view(-1)}

        found = chosen("codes", components["codes"])
        layout = layout.with_shape((*index.shape, *layout.shape[1:]))
        if layout.nested and blocks % NESTED_BLOCKSIZE:
            # groups of 256 scales span two parts
            return found | chosen("absmax", self.absmax(components, layout)), replace(layout, nested=False)
        found |= chosen("absmax", components["absmax"])
        if layout.nested:
            found |= chosen("nested_absmax", components["nested_absmax"])
            found["nested_offset"] = components["nested_offset"]
        return found, layout

    @override
    def narrow(
        self, components: Components, layout: Layout, start: int, shape: Shape
    ) -> tuple[Components, Layout] | None:
        count, size = math.prod(shape), layout.blocksize
        stop = start + count
        if start % size or (stop % size and stop != layout.numel):
            return None
        first, last = start // size, math.ceil(stop / size)
        part = {"codes": components["codes"][start // 2 : (stop + 1) // 2]}
        if not layout.nested:
            part["absmax"] = components["absmax"][first:last]
            return part, layout.with_shape(shape)
        group = first // NESTED_BLOCKSIZE
        head = group * NESTED_BLOCKSIZE
        nested = {
            "absmax": components["absmax"][head:last],
            "nested_absmax": components["nested_absmax"][group : math.ceil(last / NESTED_BLOCKSIZE)],
            "nested_offset": components["nested_offset"],
        }
        if first == head:
            return {**part, **nested}, layout.with_shape(shape)
        # the run begins inside a group of 256 scales: restore that group's and drop the scales before the run
        part["absmax"] = self.absmax(nested, layout)[first - head :]
        return part, replace(layout, shape=tuple(shape), nested=False)

    @override
    def serialize(self, name: str, components: Components, layout: Layout) -> Components:
        state: dict[str, object] = {
            "quant_type": self.name,
            "blocksize": layout.blocksize,
            "dtype": str(layout.dtype).removeprefix("torch."),
            "shape": list(layout.shape),
        }
        tensors = {
            name: components["codes"].view(-1, 1),
            f"{name}.absmax": components["absmax"],
            f"{name}.quant_map": _stored_map(self.name),
        }
        if layout.nested:
            tensors[f"{name}.nested_absmax"] = components["nested_absmax"]
            tensors[f"{name}.nested_quant_map"] = dynamic_map(_CPU)
            state["nested_blocksize"] = NESTED_BLOCKSIZE
            state["nested_dtype"] = "float32"
            state["nested_offset"] = float(components["nested_offset"])
        blob = json.dumps(state).encode("ascii")
        tensors[_state_key(name, self.name)] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
        return tensors

    @override
    def find(self, name: str, entries: Entries, read: Callable[[str], torch.Tensor]) -> Serialized | None:
        key = _state_key(name, self.name)
        if key not in entries or name not in entries:
            return None
        state = _read_state(key, read)
        layout = _read_layout(key, self.name, state)
        nested = layout.nested
        sources = {"codes": name, "absmax": f"{name}.absmax"}
        values: Components = {}
        maps = {f"{name}.quant_map": _stored_map(self.name)}
        if nested:
            sources["nested_absmax"] = f"{name}.nested_absmax"
            offset = _field(key, state, "nested_offset", float, int)
            if isinstance(offset, int) and abs(offset) > _MAX_COUNT:
                raise CheckpointError(
                    "unreadable quantization state: a nested_offset beyond all scales", where=key
                )
            values["nested_offset"] = torch.tensor(offset, dtype=torch.float32)
            maps[f"{name}.nested_quant_map"] = dynamic_map(_CPU)
        self._check(key, layout, sources, entries)
        for map_name, expected in maps.items():
            if map_name not in entries or _is_recorded(entries[map_name], expected):
                continue
            if not torch.equal(read(map_name).float(), expected):
                raise CheckpointError("a codebook other than the format's own", where=map_name)
        present = frozenset(k for k in (*sources.values(), *maps, key) if k in entries)
        return Serialized(layout, sources, values, present)

    def _check(self, key: str, layout: Layout, sources: dict[str, str], entries: Entries) -> None:
        specs = self.component_specs(layout)
        for component, source in sources.items():
            if source not in entries:
                raise CheckpointError(f"{source!r} is missing beside the quantization state", where=key)
            entry, (shape, dtype) = entries[source], specs[component]
            # codes may be stored as any dtype (quant_storage): the bytes are the same
            if component == "codes":
                size, item = math.prod(entry.shape) * entry.dtype.itemsize, entry.dtype.itemsize
                fits = size in {shape[0], math.ceil(shape[0] / item) * item}
            else:
                # old checkpoints have scales in 16 bits: they are cast
                like = entry.dtype == dtype or (dtype.is_floating_point and entry.dtype.is_floating_point)
                fits = math.prod(entry.shape) == shape[0] and like
            if not fits:
                raise CheckpointError(
                    f"{list(entry.shape)} {entry.dtype} does not hold the {component} of {list(layout.shape)} weights",
                    where=source,
                )


class _FourBitQuantizer(PieceQuantizer):
    def __init__(self, layout: Layout, components: Components, emit: Emit | None) -> None:
        self.layout = layout
        self.components = components
        self.emit = emit
        self.absmax = components["absmax"]
        if layout.nested:
            self.absmax = torch.empty(self.absmax.shape, dtype=torch.float32, device=self.absmax.device)

    @override
    def write(self, start: int, piece: torch.Tensor) -> None:
        size = self.layout.blocksize
        stop = start + piece.numel()
        first, last = start // 2, (stop + 1) // 2
        if self.emit is None:
            codes = self.components["codes"][first:last]
        else:
            codes = torch.empty(last - first, dtype=torch.uint8, device=piece.device)
        torch.ops.tuckaway.quantize_4bit_out(
            piece,
            self.layout.format,
            size,
            codes,
            self.absmax[start // size : math.ceil(stop / size)],
        )
        if self.emit is not None:
            self.emit(first, codes)

    @override
    def finish(self) -> None:
        if self.layout.nested:
            parts = (self.components[key] for key in ("absmax", "nested_absmax", "nested_offset"))
            torch.ops.tuckaway.quantize_nested_out(self.absmax, *parts)


def _is_recorded(entry: Entry, expected: torch.Tensor) -> bool:
    """Whether the file's own checksum says that it holds ``expected``: two reads a weight less, a third of a reload."""
    recorded, data = getattr(entry, "crc32", None), expected.view(torch.uint8).numpy()
    return recorded is not None and entry.dtype == expected.dtype and recorded == files.crc32(data)


def _state_key(name: str, format: str) -> str:
    return f"{name}.quant_state.bitsandbytes__{format}"


def _read_layout(key: str, format: str, state: dict[str, Any]) -> Layout:
    shape, blocksize = _field(key, state, "shape", list), _field(key, state, "blocksize", int)
    if not all(type(n) is int and 0 <= n <= _MAX_COUNT for n in shape) or math.prod(shape) > _MAX_COUNT:
        raise CheckpointError(f"unreadable quantization state: shape {shape!r}", where=key)
    if not 32 <= blocksize <= 4096 or blocksize & (blocksize - 1):
        raise CheckpointError(f"unreadable quantization state: blocksize {blocksize!r}", where=key)
    if state.get("quant_type", format) != format:
        raise CheckpointError(f"a quantization state of {state['quant_type']!r}", where=key)
    dtype = getattr(torch, _field(key, state, "dtype", str), None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise CheckpointError(f"unreadable quantization state: dtype {state['dtype']!r}", where=key)
    nested = "nested_offset" in state
    if nested and state.get("nested_blocksize") != NESTED_BLOCKSIZE:
        raise CheckpointError(
            f"nested scales in groups of {state.get('nested_blocksize')}, not {NESTED_BLOCKSIZE}", where=key
        )
    return Layout(format=format, shape=tuple(shape), dtype=dtype, blocksize=blocksize, nested=nested)


def _field(key: str, state: dict[str, Any], name: str, *types: type) -> Any:
    value = state.get(name)
    if type(value) not in types:
        raise CheckpointError(f"unreadable quantization state: {name} is {value!r}", where=key)
    return value


def _read_state(key: str, read: Callable[[str], torch.Tensor]) -> dict[str, Any]:
    try:
        state = json.loads(bytes(read(key).tolist()))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"unreadable quantization state: {error}", where=key) from error
    if not isinstance(state, dict):
        raise CheckpointError("the quantization state is no JSON object", where=key)
    return state


def _stored_map(format: str) -> torch.Tensor:
    values = codebook(format, _CPU)
    # bitsandbytes stores +0.0 for fp4's code 8, though its kernels decode it to -0.0
    return values + 0.0 if format == "fp4" else values


register(FourBit("nf4"))
register(FourBit("fp4"))
