"""Which tensors of a checkpoint feed which of the model, and the words of a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tuckaway import QuantizationConfig, quantize
from tuckaway.checkpoint import Checkpoint
from tuckaway.errors import DTypeMismatch, KeyMismatch, ShapeMismatch
from tuckaway.formats import format_of
from tuckaway.load.match import Match, match_checkpoint, match_model
from tuckaway.tensor import TensorSpec, layout_for

CONFIG = QuantizationConfig(compute_dtype=torch.float32)
PLAIN = TensorSpec((4, 6), torch.float32)


def quantized(
    shape: tuple[int, int], config: QuantizationConfig = CONFIG, *, transposed: bool = False
) -> TensorSpec:
    stored = shape[::-1] if transposed else shape
    return TensorSpec(shape, torch.float32, layout_for(config, stored, torch.float32, transposed=transposed))


def match(
    folder: Path, state: dict[str, torch.Tensor], specs: dict[str, TensorSpec], **options: Any
) -> Match:
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    options = {"groups": [], "config": CONFIG, "real": (), **options}
    return match_checkpoint(Checkpoint.open(folder), specs, **options)


def serialized(
    name: str, weight: torch.Tensor, config: QuantizationConfig = CONFIG
) -> dict[str, torch.Tensor]:
    made = quantize(weight, config)
    return {
        key: part.contiguous()
        for key, part in format_of(made.format).serialize(name, made.components, made.layout_info).items()
    }


def test_plain_and_to_be_quantized(tmp_path: Path) -> None:
    specs = {"a": PLAIN, "b": quantized((64, 64))}
    found = match(tmp_path, {"a": torch.ones(4, 6), "b": torch.ones(64, 64)}, specs)
    assert [feed.names for feed in found.feeds] == [("a",), ("b",)]
    assert all(set(feed.entries) == {""} and not feed.quantized_already for feed in found.feeds)
    assert found.specs == specs
    assert found.kept == found.unexpected == ()


@pytest.mark.parametrize("held", [["a"], ["c"], ["a", "b", "c"]])
def test_a_tie_is_fed_once_under_any_of_its_names(held: list[str], tmp_path: Path) -> None:
    state = {name: torch.ones(4, 6) for name in held}
    found = match(tmp_path, state, dict.fromkeys("abc", PLAIN), groups=[["a", "b", "c"]])
    (feed,) = found.feeds
    assert feed.names == ("a", "b", "c")
    assert feed.entries[""].name == held[0]
    assert [copy[""].name for copy in feed.copies] == held[1:]
    assert set(found.specs) == {"a", "b", "c"}


def test_what_keeps_its_value(tmp_path: Path) -> None:
    specs = {
        "a": PLAIN,
        "rotary": TensorSpec((2,), torch.float32, is_buffer=True, persistent=False),
        "mask": TensorSpec((2,), torch.bool, is_buffer=True),
        "p": TensorSpec((2,), torch.float32),
    }
    state = {"a": torch.ones(4, 6)}
    with pytest.raises(KeyMismatch, match="lacks 2 tensors: 'mask', 'p'"):
        match(tmp_path, state, specs)
    with pytest.raises(KeyMismatch, match="lacks 1 tensor: 'p'"):  # a real parameter too: strict
        match(tmp_path, state, specs, real=["mask", "p"])
    found = match(tmp_path, state, specs, real=["mask", "p"], strict=False)
    assert found.kept == ("rotary", "mask", "p")


def test_a_buffer_that_is_not_saved_but_lies_in_the_file_is_no_surplus(tmp_path: Path) -> None:
    specs = {"a": PLAIN, "rotary": TensorSpec((2,), torch.float32, is_buffer=True, persistent=False)}
    found = match(tmp_path, {"a": torch.ones(4, 6), "rotary": torch.ones(2)}, specs)
    assert found.unexpected == ()


def test_surplus(tmp_path: Path) -> None:
    state = {"a": torch.ones(4, 6), "h.0.attn.masked_bias": torch.ones(1), "old": torch.ones(1)}
    with pytest.raises(KeyMismatch, match="no place for 2 tensors"):
        match(tmp_path, state, {"a": PLAIN})
    with pytest.raises(KeyMismatch, match="no place for 1 tensor: 'old'"):
        match(tmp_path, state, {"a": PLAIN}, ignored=[r"h\.\d+\.attn\.masked_bias"])
    assert match(tmp_path, state, {"a": PLAIN}, strict=False).unexpected == ("h.0.attn.masked_bias", "old")


def test_only_twenty_names_are_listed(tmp_path: Path) -> None:
    specs = {f"w{i:02}": PLAIN for i in range(30)}
    with pytest.raises(
        KeyMismatch, match=r"lacks 30 tensors: 'w00', .*'w19' and 10 more \(model\.safetensors\)"
    ) as e:
        match(tmp_path, {"x": torch.ones(1)}, specs, strict=False)
    assert "w20" not in str(e.value)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6, 1), (24,), (), (4, 0)], ids=str)
def test_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ShapeMismatch, match=r"'a' is \[.*\] in the checkpoint and \[4, 6\] in the model"):
        match(tmp_path, {"a": torch.ones(shape)}, {"a": PLAIN})


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.uint8], ids=str)
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(DTypeMismatch, match=f"'a' is {dtype} in the checkpoint and torch.float32"):
        match(tmp_path, {"a": torch.ones(4, 6).to(dtype)}, {"a": PLAIN})
    integers = TensorSpec((4, 6), torch.int64)
    with pytest.raises(DTypeMismatch):
        match(tmp_path, {"a": torch.ones(4, 6)}, {"a": integers})
    assert match(
        tmp_path, {"a": torch.ones(4, 6).to(dtype)}, {"a": integers}
    ).feeds  # widened, as torch would


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("wanted", ["plain", "the same", "another"])
def test_what_is_quantized_already_keeps_its_format(format: str, wanted: str, tmp_path: Path) -> None:
    config = QuantizationConfig(format, blocksize=32)
    spec = {
        "plain": TensorSpec((64, 96), torch.float32),
        "the same": quantized((64, 96), config),
        "another": quantized((64, 96), QuantizationConfig("fp4" if format == "nf4" else "nf4")),
    }[wanted]
    state = serialized("l.weight", torch.randn(64, 96), config)
    found = match(tmp_path, state, {"l.weight": spec})
    (feed,) = found.feeds
    assert feed.quantized_already
    assert feed.spec.layout is not None
    assert (feed.spec.layout.format, feed.spec.layout.shape) == (format, (64, 96))
    assert feed.spec.layout.compute_dtype == CONFIG.compute_dtype
    assert feed.spec.dtype == CONFIG.plain_dtype
    assert found.unexpected == ()


def test_without_a_config_it_has_the_dtype_it_was_quantized_from(tmp_path: Path) -> None:
    state = serialized("l.weight", torch.randn(64, 96, dtype=torch.bfloat16))
    (feed,) = match(tmp_path, state, {"l.weight": TensorSpec((64, 96), torch.float32)}, config=None).feeds
    assert feed.spec.dtype == torch.bfloat16
    assert feed.spec.layout is not None
    assert feed.spec.layout.compute_dtype is None


@pytest.mark.parametrize(
    ("model", "stored", "asked", "found"),
    [
        ((64, 96), (64, 96), False, False),
        ((96, 64), (64, 96), True, True),
        ((96, 64), (64, 96), False, True),
        ((64, 64), (64, 64), True, True),
        ((64, 64), (64, 64), False, False),
    ],
)
def test_stored_transposed(
    model: tuple[int, int], stored: tuple[int, int], asked: bool, found: bool, tmp_path: Path
) -> None:
    state = serialized("l.weight", torch.randn(stored))
    (feed,) = match(tmp_path, state, {"l.weight": quantized(model, transposed=asked)}).feeds
    assert feed.spec.layout is not None
    assert (feed.spec.layout.shape, feed.spec.layout.transposed) == (stored, found)
    assert feed.spec.shape == model


def test_quantized_of_another_shape(tmp_path: Path) -> None:
    state = serialized("l.weight", torch.randn(64, 96))
    with pytest.raises(ShapeMismatch, match=r"\[64, 96\] in the checkpoint and \[64, 64\] in the model"):
        match(tmp_path, state, {"l.weight": quantized((64, 64))})


def test_a_model_feeds_itself_what_is_to_be_quantized() -> None:
    done = quantize(torch.randn(64, 64), CONFIG)
    state = {"a": torch.ones(4, 6), "b": torch.ones(64, 64), "c": done, "t": torch.ones(64, 64)}
    state["u"] = state["t"]
    specs = {"a": PLAIN, "b": quantized((64, 64)), "c": TensorSpec.of(done), "t": quantized((64, 64))}
    specs["u"] = specs["t"]
    found = match_model(specs, [["t", "u"]], state)
    assert [feed.names for feed in found.feeds] == [("b",), ("t", "u")]
    assert found.kept == ("a", "c")
