"""Eight-bit floats with scales: every kind of scale, in pieces, towards plain and quantized weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tuckaway
from loading import read_all
from tuckaway import QuantizationConfig, load_and_quantize_model, quantize_checkpoint
from tuckaway.errors import ShapeMismatch
from tuckaway.load.scaled import ScaledSink, scales_of
from tuckaway.load.sinks import PlainSink

CPU = torch.device("cpu")


def expanded(scale: torch.Tensor, shape: tuple[int, ...], blocks: tuple[int, ...]) -> torch.Tensor:
    for dim, (size, block) in enumerate(zip(shape, blocks, strict=True)):
        scale = scale.repeat_interleave(block, dim).narrow(dim, 0, size)
    return scale


CASES = [
    ((256, 384), (2, 3), (128, 128)),
    ((200, 300), (2, 3), (128, 128)),
    ((200, 300), (1, 1), (200, 300)),
    ((200, 300), (200, 1), (1, 300)),
    ((64, 96), (2, 3), (32, 32)),
    ((3, 130, 200), (3, 2, 2), (1, 128, 128)),
    ((3, 130, 200), (3, 1, 1), (1, 130, 200)),
    ((5,), (1,), (5,)),
]


@pytest.mark.parametrize(("shape", "scale_shape", "blocks"), CASES)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_codes_times_scales(shape, scale_shape, blocks, dtype):
    torch.manual_seed(0)
    codes = torch.randn(shape).to(dtype)
    scale = torch.rand(scale_shape) + 0.5
    expected = codes.float() * expanded(scale, shape, blocks)
    target = torch.full(shape, float("nan"))
    sink = ScaledSink(PlainSink(target), scale, shape, CPU)
    assert sink.align == shape[-1]
    for start in range(0, codes.numel(), 7 * shape[-1]):
        sink.write(start, codes.view(-1)[start : start + 7 * shape[-1]])
    sink.finish()
    assert torch.equal(target, expected)


@pytest.mark.parametrize("scale", [torch.tensor(0.25), torch.tensor([0.25]), torch.tensor([[0.25]])])
def test_one_scale_for_all(scale):
    codes = torch.randn(8, 16).to(torch.float8_e4m3fn)
    target = torch.empty(8, 16)
    ScaledSink(PlainSink(target), scale, (8, 16), CPU).write(0, codes.view(-1))
    assert torch.equal(target, codes.float() / 4)


def test_scales_of_a_row_without_the_other_dimension():
    codes = torch.randn(8, 16).to(torch.float8_e4m3fn)
    scale, target = torch.rand(8), torch.empty(8, 16)
    ScaledSink(PlainSink(target), scale, (8, 16), CPU).write(0, codes.view(-1))
    assert torch.equal(target, codes.float() * scale[:, None])


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (0, 3)])
def test_scales_that_do_not_fit(shape):
    with pytest.raises(ShapeMismatch, match="do not fit"):
        ScaledSink(PlainSink(torch.empty(200, 300)), torch.ones(shape), (200, 300), CPU)


def test_names():
    names = {"a.weight", "a.weight_scale", "a.input_scale", "b.weight", "experts.up", "experts.up_scale_inv"}
    assert scales_of("a.weight", names) == ("a.weight_scale", {"a.weight_scale", "a.input_scale"})
    assert scales_of("b.weight", names) == (None, set())
    assert scales_of("experts.up", names) == ("experts.up_scale_inv", {"experts.up_scale_inv"})


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 256)
        self.blocked = nn.Linear(256, 300)
        self.scaled = nn.Linear(300, 256, bias=False)
        self.bare = nn.Linear(256, 128)
        self.wide = nn.Linear(128, 256)
        self.head = nn.Linear(256, 64)


def mixed_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Write fp8 with two kinds of scales and without, fp64, fp16, bf16 and fp32; return what they stand for."""
    torch.manual_seed(0)
    state = {name: value.detach() for name, value in Mixed().state_dict().items()}
    stored = dict(state)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    scale = torch.rand(3, 2) / 100 + 0.001
    stored["blocked.weight"] = (state["blocked.weight"] * 300).to(e4m3)
    stored["blocked.weight_scale_inv"] = scale
    state["blocked.weight"] = stored["blocked.weight"].float() * expanded(scale, (300, 256), (128, 128))
    stored["scaled.weight"] = (state["scaled.weight"] * 300).to(e5m2)
    stored["scaled.weight_scale"] = torch.tensor([1 / 300])
    stored["scaled.input_scale"] = torch.tensor([7.0])
    state["scaled.weight"] = stored["scaled.weight"].float() * torch.tensor(1 / 300)
    stored["bare.weight"] = state["bare.weight"].to(e5m2)
    state["bare.weight"] = stored["bare.weight"].float()
    stored["wide.weight"] = state["wide.weight"].double()
    stored["embed.weight"] = state["embed.weight"].half()
    state["embed.weight"] = stored["embed.weight"].float()
    stored["head.weight"] = state["head.weight"].bfloat16()
    state["head.weight"] = stored["head.weight"].float()
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    return state


@pytest.mark.parametrize("format", [None, "nf4", "int8"])
def test_a_checkpoint_of_all_kinds(tmp_path, format):
    state = mixed_checkpoint(tmp_path / "source")
    config = None if format is None else QuantizationConfig(format=format, compute_dtype=torch.float32)
    with tuckaway.init_empty_weights():
        model = Mixed()
    if config is None:
        model = tuckaway.load_checkpoint_and_dispatch(model, tmp_path / "source", strict=True)
    else:
        model = load_and_quantize_model(model, config, tmp_path / "source")
    for name, value in model.state_dict().items():
        expected = state[name]
        if isinstance(value, tuckaway.QuantizedTensor):
            expected, value = tuckaway.quantize(expected, config).dequantize(), value.dequantize()
        assert torch.equal(value, expected), name


def test_the_checkpoints_own_fp8_is_no_format_to_load_to(tmp_path):
    mixed_checkpoint(tmp_path / "source")
    with tuckaway.init_empty_weights():
        model = Mixed()
    model = load_and_quantize_model(model, weights_location=tmp_path / "source")
    assert model.blocked.weight.format == "nf4"


def test_converting_it_by_names_is_loading_and_saving_it(tmp_path):
    mixed_checkpoint(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", "nf4")
    with tuckaway.init_empty_weights():
        model = Mixed()
    tuckaway.save_model(load_and_quantize_model(model, "nf4", tmp_path / "source"), tmp_path / "expected")
    found, expected = read_all(tmp_path / "out"), read_all(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].view(-1), value.view(-1)) for key, value in expected.items())


def test_stacked_experts_in_pieces(tmp_path, monkeypatch):
    from tuckaway.load import carry

    monkeypatch.setattr(carry, "PIECE_BYTES", 40_000)  # several pieces an expert

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.zeros(3, 256, 200))

    codes, scale = torch.randn(3, 256, 200).to(torch.float8_e4m3fn), torch.rand(3, 2, 2)
    save_file({"up": codes, "up_scale_inv": scale}, tmp_path / "model.safetensors")
    with tuckaway.init_empty_weights():
        model = Experts()
    tuckaway.load_checkpoint_in_model(model, tmp_path)
    assert math.prod(model.up.shape) == codes.numel()
    assert torch.equal(model.up, codes.float() * expanded(scale, (3, 256, 200), (1, 128, 128)))
