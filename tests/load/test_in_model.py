"""accelerate's ``load_checkpoint_in_model``: values in, no hooks."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch

import tuckaway
from loading import assert_same_state, empty_net, net, refused, tokens
from tuckaway.errors import ConfigError, KeyMismatch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tuckaway.save_model(net(), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, "fp16"])
def test_a_model_with_values_gets_those_of_the_checkpoint_as_with_accelerate(dtype, folder: Path) -> None:
    ours = tuckaway.load_checkpoint_in_model(net(seed=3), folder, dtype=dtype)
    if dtype is None:
        theirs = net(seed=3)
        accelerate.load_checkpoint_in_model(theirs, folder)
        assert_same_state(ours, theirs)
    assert not any(hasattr(module, "_hf_hook") for module in ours.modules())
    assert ours.layers[0].up.weight.dtype == {None: torch.float32, "fp16": torch.float16}.get(dtype, dtype)


def test_an_empty_model(folder: Path, tmp_path: Path) -> None:
    model = tuckaway.load_checkpoint_in_model(empty_net(), folder)
    paged = tuckaway.load_checkpoint_in_model(
        empty_net(), folder, {"": "cpu", "layers": "disk"}, offload_folder=tmp_path / "pages"
    )
    with torch.no_grad():
        assert torch.equal(model(tokens()), net()(tokens()))
        assert torch.equal(paged(tokens()), model(tokens()))


def test_modules_that_are_kept_in_fp32(folder: Path) -> None:
    model = tuckaway.load_checkpoint_in_model(
        empty_net(), folder, dtype="bf16", keep_in_fp32_modules=["norm", "layers.1.up"]
    )
    fp32 = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert fp32 == {
        *(
            f"{path}norm.{own}"
            for path in ("", "layers.0.", "layers.1.", "layers.2.")
            for own in ("weight", "bias")
        ),
        "layers.1.up.weight",
        "layers.1.up.bias",
    }


@pytest.mark.parametrize(
    "given", [{"offload_8bit_bnb": True}, {"full_state_dict": False}, {"broadcast_from_rank0": True}]
)
def test_what_makes_no_sense_here_is_said(given: dict[str, bool], folder: Path) -> None:
    model = net()
    with refused(ConfigError, f"{next(iter(given))} cannot be", model):
        tuckaway.load_checkpoint_in_model(model, folder, **given)


def test_strict(folder: Path) -> None:
    model = net(layers=2)
    with refused(KeyMismatch, "no place for", model):
        tuckaway.load_checkpoint_in_model(model, folder, strict=True)
    tuckaway.load_checkpoint_in_model(model, folder)
    assert torch.equal(model.layers[1].w, net().layers[1].w)
