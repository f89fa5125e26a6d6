"""What every sink writes, whatever pieces the tensor comes in, is what the whole tensor gives."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from tuckaway import QuantizationConfig, quantize
from tuckaway.load import sinks
from tuckaway.load.sinks import CopySink, PlainSink, Sink, sink_for, strip_rows
from tuckaway.tensor import TensorSpec, layout_for

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CONFIGS = [
    QuantizationConfig("nf4"),
    QuantizationConfig("nf4", nested=False, blocksize=32),
    QuantizationConfig("fp4", blocksize=512),
    QuantizationConfig("int8"),
]


def feed(sink: Sink, source: torch.Tensor, *, pieces: int) -> None:
    """Give a tensor to a sink in about so many pieces, as the reader would."""
    flat = source.reshape(-1)
    step = flat.numel() if sink.whole else max(math.ceil(flat.numel() / pieces / sink.align), 1) * sink.align
    starts = list(range(0, flat.numel(), max(step, 1)))
    random.Random(0).shuffle(starts)
    for start in starts:
        piece = flat[start : start + step].clone()
        sink.write(start, piece)
        piece.fill_(
            9
        ) if piece.dtype != torch.bool else piece.zero_()  # a piece is valid during the call only
    sink.finish()


@pytest.mark.parametrize("pieces", [1, 3, 1000])
@pytest.mark.parametrize("shape", [(7, 5), (1,), (), (0, 3), (2, 3, 4)], ids=str)
def test_plain_is_a_cast(shape: tuple[int, ...], pieces: int) -> None:
    for source_dtype, target_dtype in itertools.product([*DTYPES, torch.float64], DTYPES):
        source = torch.randn(shape, dtype=source_dtype)
        target = torch.full(shape, float("nan"), dtype=target_dtype)
        feed(PlainSink(target), source, pieces=pieces)
        assert torch.equal(target, source.to(target_dtype))
    for dtype in (torch.int64, torch.bool, torch.uint8):
        values = torch.randint(0, 2, shape).to(dtype)
        target = torch.ones(shape, dtype=dtype)
        feed(PlainSink(target), values, pieces=pieces)
        assert torch.equal(target, values)


@pytest.mark.parametrize("pieces", [1, 3, 1000])
@pytest.mark.parametrize("stored", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [0, 1, 5, 64, 129])
def test_codes_stored_as_another_dtype(count: int, stored: torch.dtype, pieces: int) -> None:
    codes = torch.randint(0, 256, (count,), dtype=torch.uint8)
    padded = torch.zeros(math.ceil(count / stored.itemsize) * stored.itemsize, dtype=torch.uint8)
    padded[:count] = codes
    target = torch.full((count,), 255, dtype=torch.uint8)
    feed(CopySink(target, stored), padded.view(stored).view(-1, 1), pieces=pieces)
    assert torch.equal(target, codes)


def test_scales_stored_in_half_precision_are_cast() -> None:
    scales = torch.rand(33, dtype=torch.bfloat16)
    target = torch.empty(33)
    feed(CopySink(target, torch.bfloat16), scales, pieces=4)
    assert torch.equal(target, scales.float())


@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.format}-{c.blocksize}")
@pytest.mark.parametrize("shape", [(64, 96), (33, 65), (1, 7), (3, 33, 31), (130, 1), (0, 8)], ids=str)
def test_quantizing_in_pieces(
    shape: tuple[int, ...], config: QuantizationConfig, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "_STRIP_BYTES", 4096)  # strips, where a real matrix would have them
    for dtype, seen in itertools.product(DTYPES, [torch.float32, torch.bfloat16]):
        source = torch.randn(shape, dtype=dtype)
        stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
        layout = layout_for(config, stored, seen, transposed=transposed)
        expected = quantize(source.to(seen), config, transposed=transposed)
        for pieces in (1, 5):
            spec = TensorSpec(shape, seen, layout)
            components = spec.empty("cpu")
            sink = sink_for(spec, components)
            assert sink.whole == transposed
            feed(sink, source, pieces=pieces)
            assert all(torch.equal(components[k], v) for k, v in expected.components.items())
            assert torch.equal(spec.build(components).dequantize(), expected.dequantize())


@pytest.mark.parametrize("cols", [1, 31, 64, 100, 4096, 2**22])
@pytest.mark.parametrize("align", [1, 32, 64, 4096])
def test_strips_end_between_blocks_and_are_bounded(cols: int, align: int) -> None:
    rows = 10**6
    step = strip_rows(rows, cols, align)
    assert 1 <= step <= rows
    assert step == rows or step * cols % align == 0
    least = align // math.gcd(cols, align)
    assert step in (least, rows) or 4 * step * cols <= sinks._STRIP_BYTES
    assert strip_rows(3, cols, align) <= max(3, 1)
    assert strip_rows(0, cols, align) == 1
    assert strip_rows(5, 0, align) >= 1


def test_a_plain_sink_for_what_is_not_quantized() -> None:
    spec = TensorSpec((2, 3), torch.float16)
    assert isinstance(sink_for(spec, spec.empty("cpu")), PlainSink)
