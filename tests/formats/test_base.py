"""The registry, and what every format in it has in common."""

from __future__ import annotations

import pytest
import torch

from tuckaway.errors import ConfigError
from tuckaway.formats import Format, Layout, base, format_of, registered_formats
from tuckaway.formats.four_bit import FourBit

SHAPES = [(64, 96), (3, 33), (1, 1), (5,), (2, 3, 32), (0, 64), (127, 1), ()]


def layouts(shape: tuple[int, ...]) -> list[Layout]:
    four = [
        Layout(name, shape, torch.float32, blocksize, nested)
        for name in ("nf4", "fp4")
        for blocksize in (32, 64, 512)
        for nested in (False, True)
    ]
    return [*four, Layout("int8", shape, torch.float16, int8_threshold=6.0)]


def test_look_up() -> None:
    assert set(registered_formats()) == {"nf4", "fp4", "int8"}
    assert all(format_of(name) is format for name, format in registered_formats().items())
    assert all(format.name == name for name, format in registered_formats().items())


@pytest.mark.parametrize(
    ("name", "hint"), [("nf5", "did you mean 'nf4'"), ("awq", "known are fp4, int8, nf4"), ("", "known are")]
)
def test_unknown_format(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        format_of(name)


def test_the_registry_that_is_returned_is_a_copy() -> None:
    registered_formats().clear()  # type: ignore[attr-defined]
    assert registered_formats()


def test_a_new_format_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    fifth = base.register(FourBit("nf4-other"))
    assert format_of("nf4-other") is fifth


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_components_are_what_their_specs_say(shape: tuple[int, ...]) -> None:
    source = torch.randn(shape)
    for layout in layouts(shape):
        format: Format = format_of(layout.format)
        specs = format.component_specs(layout)
        made = format.quantize(source, layout)
        assert {key: (tuple(t.shape), t.dtype) for key, t in made.items()} == specs
        assert list(made) == list(specs)
        meta = format.empty(layout, "meta")
        assert {key: (tuple(t.shape), t.dtype) for key, t in meta.items()} == specs
        restored = format.dequantize(made, layout, torch.float32)
        assert restored.shape == source.shape
        assert restored.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pieces_give_the_bytes_of_the_whole(shape: tuple[int, ...]) -> None:
    source = torch.randn(shape)
    for layout in layouts(shape):
        format = format_of(layout.format)
        whole = format.quantize(source, layout)
        parts = format.empty(layout, "cpu")
        quantizer, step = format.quantizer(layout, parts), format.piece_alignment(layout)
        for start in reversed(range(0, source.numel(), step)):
            quantizer.write(start, source.reshape(-1)[start : start + step])
        quantizer.finish()
        assert all(torch.equal(parts[key], whole[key]) for key in whole)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_serialized_is_found_again(shape: tuple[int, ...]) -> None:
    source = torch.randn(shape)
    for name in ("weight", "layer.weight", "layer.w"):
        for layout in layouts(shape):
            format = format_of(layout.format)
            made = format.quantize(source, layout)
            written = format.serialize(name, made, layout)
            written["another.weight"] = torch.zeros(3)
            found = [f.find(name, written, written.__getitem__) for f in registered_formats().values()]
            (one,) = [f for f in found if f is not None]
            kept = (
                "format",
                "shape",
                "blocksize",
                "nested",
                *(() if layout.format == "int8" else ("dtype",)),
            )
            assert [getattr(one.layout, k) for k in kept] == [getattr(layout, k) for k in kept]
            assert one.consumed == set(written) - {"another.weight"}
            for key, tensor in made.items():
                stored = one.values[key] if key in one.values else written[one.sources[key]]
                assert torch.equal(stored.reshape(tensor.shape), tensor), key
            assert format.find("another.weight", written, written.__getitem__) is None
            assert format.find("no.such", written, written.__getitem__) is None


def test_serialize_needs_no_bytes_but_the_offset() -> None:
    for layout in layouts((64, 96)):
        format = format_of(layout.format)
        real = format.serialize("weight", format.quantize(torch.randn(64, 96), layout), layout)
        meta = format.empty(layout, "meta")
        if "nested_offset" in meta:
            meta["nested_offset"] = torch.tensor(0.5)
        planned = format.serialize("weight", meta, layout)
        same = {k: (t.shape, t.dtype) for k, t in real.items() if "quant_state" not in k}
        assert {k: (t.shape, t.dtype) for k, t in planned.items() if "quant_state" not in k} == same
