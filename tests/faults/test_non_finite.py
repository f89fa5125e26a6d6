"""NaN or infinity in a weight that is to be quantized is an error with names and counts, or kept when asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tuckaway
from loading import FP32, Net, empty_net, net, refused, tokens
from tuckaway.errors import ConfigError, NonFiniteError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with three values in two weights that no scale can be made of, and one in a norm."""
    state = {name: tensor.clone() for name, tensor in net().state_dict().items()}
    state["layers.0.up.weight"][0, 0] = float("nan")
    state["layers.0.up.weight"][-1, -1] = float("inf")
    state["layers.2.down.weight"][3, 5] = -float("inf")
    state["norm.bias"][2] = float("nan")
    (tmp_path / "checkpoint").mkdir()
    save_file(state, tmp_path / "checkpoint" / "model.safetensors")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("place", ["cpu", {"": "cpu", "layers": "disk"}])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_they_are_counted_by_name(folder: Path, format: str, place: object) -> None:
    config = FP32.replace(format=format)
    empty = empty_net()
    with refused(
        NonFiniteError, r"'layers.0.up.weight' \(2\), 'layers.2.down.weight' \(1\)", empty, folder / "store"
    ):
        tuckaway.load_and_quantize_model(
            empty, config, folder, device_map=place, offload_folder=folder / "store"
        )


def test_a_model_with_real_weights(folder: Path) -> None:
    model = net()
    with torch.no_grad():
        model.layers[1].up.weight[4, 4] = float("nan")
    with refused(NonFiniteError, r"'layers.1.up.weight' \(1\)", model):
        tuckaway.load_and_quantize_model(model, FP32)


def test_kept_when_asked(folder: Path) -> None:
    empty = tuckaway.load_and_quantize_model(empty_net(), FP32, folder, non_finite="keep")
    assert not empty.layers[0].up.weight.dequantize()[0, 0].isfinite()
    assert empty.layers[1].up.weight.dequantize().isfinite().all()


def test_weights_that_stay_floats_may_hold_them(folder: Path) -> None:
    model = tuckaway.load_checkpoint_and_dispatch(empty_net(), folder, "cpu")
    assert model.layers[0].up.weight[0, 0].isnan()
    assert model.norm.bias[2].isnan()


def test_a_value_that_the_dtype_of_the_weight_cannot_hold(tmp_path: Path) -> None:
    """1e6 is finite in the checkpoint, and infinite in fp16, which is what would be quantized."""
    state = net().state_dict()
    state["layers.0.up.weight"] = state["layers.0.up.weight"].clone()
    state["layers.0.up.weight"][0, 0] = 1e6
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"'layers.0.up.weight' \(1\)"):
        tuckaway.load_and_quantize_model(empty_net(), FP32.replace(dtype="fp16"), tmp_path)


def test_a_conversion(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"layers.0.up.weight"):
        tuckaway.quantize_checkpoint(folder, tmp_path / "out", FP32, model=empty_net())
    assert not (tmp_path / "out").exists()
    tuckaway.quantize_checkpoint(folder, tmp_path / "out", FP32, model=empty_net(), non_finite="keep")
    assert (tmp_path / "out").exists()


def test_the_policy_is_checked_first(folder: Path) -> None:
    with refused(ConfigError, "'raise' or 'keep', not 'ignore'", empty := empty_net()):
        tuckaway.load_and_quantize_model(empty, FP32, folder, non_finite="ignore")


@pytest.mark.parametrize("nested", [False, True])
def test_zero_blocks_and_finite_extremes_pass(tmp_path: Path, nested: bool) -> None:
    """A block of zeros, and the largest floats, have finite scales and decode to finite values."""
    state = {name: tensor.clone() for name, tensor in net().state_dict().items()}
    state["layers.0.up.weight"][:2] = 0
    state["layers.0.up.weight"][5, 5] = torch.finfo(torch.float32).max / 256
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"more than fp16 can: 'layers.0.up.weight' \(1\)"):
        tuckaway.load_and_quantize_model(empty_net(), FP32.replace(format="int8"), tmp_path)
    for format in ("nf4", "fp4"):
        model: Net = tuckaway.load_and_quantize_model(
            empty_net(), FP32.replace(format=format, nested=nested), tmp_path
        )
        decoded = model.layers[0].up.weight.dequantize()
        assert decoded.isfinite().all()
        if (
            not nested
        ):  # the scales of zeros are as near as the largest scale lets them be, as in bitsandbytes
            assert not decoded[:2].any()
    with torch.no_grad():
        assert model(tokens()).shape == (2, 7, 96)
