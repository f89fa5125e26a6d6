"""int8 rows against bitsandbytes' LLM.int8(): keys, bytes, both directions; and what is refused."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from tuckaway.errors import CheckpointError
from tuckaway.formats import Layout, format_of

INT8 = format_of("int8")


def linear_state(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What bitsandbytes' own layer saves."""
    layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    return {key: value.clone() for key, value in layer.to("cpu").state_dict().items()}


def written(weight: torch.Tensor, name: str = "weight") -> dict[str, torch.Tensor]:
    layout = Layout("int8", tuple(weight.shape), weight.dtype)
    return INT8.serialize(name, INT8.quantize(weight, layout), layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (33, 96), (1, 64), (48, 1), (7, 5)], ids=str)
def test_keys_and_scales_are_theirs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    theirs, ours = linear_state(weight), written(weight)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert (ours[key].dtype, ours[key].shape) == (theirs[key].dtype, theirs[key].shape), key
    assert torch.equal(ours["SCB"], theirs["SCB"])
    assert torch.equal(ours["weight_format"], theirs["weight_format"])
    # CUDA multiplies with an approximate reciprocal, their CPU code divides: codes on a tie may differ by one
    apart = (ours["weight"].int() - theirs["weight"].int()).abs()
    assert apart.max() <= 1
    assert (apart != 0).float().mean() < 1e-3


def test_their_layer_reads_ours() -> None:
    weight = torch.randn(64, 96, dtype=torch.float16)
    state = written(weight)
    layer = bnb.nn.Linear8bitLt(96, 64, bias=False, has_fp16_weights=False, threshold=0.0)
    layer.weight = bnb.nn.Int8Params(torch.zeros(64, 96), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")  # makes it a quantized layer, which alone loads quantized weights
    layer.load_state_dict({k: v.clone() for k, v in state.items()})
    assert torch.equal(layer.weight.data, state["weight"])
    assert torch.equal(layer.weight.SCB, state["SCB"])


def test_ours_reads_theirs() -> None:
    weight = torch.randn(64, 96, dtype=torch.bfloat16)
    theirs = linear_state(weight)
    found = INT8.find("weight", theirs, theirs.__getitem__)
    assert found is not None
    assert found.consumed == {"weight", "SCB", "weight_format"}
    parts = {key: theirs[source] for key, source in found.sources.items()}
    decoded = INT8.dequantize(parts, found.layout, torch.float32)
    scale = theirs["SCB"][:, None] * torch.tensor(7.874015718698502e-3)
    assert torch.equal(decoded, theirs["weight"].float() * scale)
    again = INT8.serialize("weight", parts, found.layout)
    assert all(torch.equal(again[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("name", "scales", "kind"),
    [
        ("weight", "SCB", "weight_format"),
        ("a.b.weight", "a.b.SCB", "a.b.weight_format"),
        ("a.w", "a.w.SCB", "a.w.weight_format"),
        ("a.gate_weight", "a.gate_weight.SCB", "a.gate_weight.weight_format"),
    ],
)
def test_keys_beside_a_weight_and_under_any_other_name(name: str, scales: str, kind: str) -> None:
    state = written(torch.randn(4, 8), name)
    assert state.keys() == {name, scales, kind}
    found = INT8.find(name, state, state.__getitem__)
    assert found is not None
    assert found.sources == {"codes": name, "absmax": scales}


def test_two_weights_of_one_module_have_scales_of_their_own() -> None:
    both = written(torch.randn(4, 8), "m.weight") | written(torch.randn(6, 8), "m.in_proj_weight")
    assert len(both) == 6


def test_three_dimensions() -> None:
    weight = torch.randn(3, 5, 16)
    state = written(weight)
    assert state["SCB"].shape == (15,)
    found = INT8.find("weight", state, state.__getitem__)
    assert found is not None
    assert found.layout.shape == (3, 5, 16)


def test_plain_integers_are_no_quantized_weight() -> None:
    state = {"weight": torch.zeros(4, 8, dtype=torch.int8)}
    assert INT8.find("weight", state, state.__getitem__) is None
    state = {"weight": torch.zeros(4, 8), "SCB": torch.zeros(4)}
    assert INT8.find("weight", state, state.__getitem__) is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SCB", torch.ones(5), "does not hold the scales of 4 rows"),
        ("SCB", torch.ones(0), "does not hold the scales of 4 rows"),
        ("SCB", torch.ones(4, dtype=torch.int32), "does not hold the scales of 4 rows"),
        ("weight_format", torch.tensor(2, dtype=torch.uint8), "in the tiled format 2"),
        ("weight_format", torch.zeros(3, dtype=torch.uint8), r"\[3\] names no format"),
    ],
)
def test_what_makes_no_sense_is_refused(key: str, value: torch.Tensor, message: str) -> None:
    state = written(torch.randn(4, 8))
    state[key] = value
    with pytest.raises(CheckpointError, match=message):
        INT8.find("weight", state, state.__getitem__)


@pytest.mark.parametrize(
    ("start", "shape", "fits"), [(8, (2, 8), True), (4, (1, 8), False), (0, (3,), False)]
)
def test_narrow(start: int, shape: Any, fits: bool) -> None:
    layout = Layout("int8", (4, 8), torch.float32)
    made = INT8.quantize(torch.randn(4, 8), layout)
    part = INT8.narrow(made, layout, start, shape)
    assert (part is not None) == fits
    if part is not None:
        expected = INT8.dequantize(made, layout, torch.float32)[1:3]
        assert torch.equal(INT8.dequantize(*part, torch.float32), expected)
