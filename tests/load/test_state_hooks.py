"""Modules that change a state while it is loaded, and modules that keep more than tensors in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tuckaway
from loading import FP32, read_all, refused
from tuckaway.errors import ConfigError, KeyMismatch, MismatchError
from zoo.awkward_models import ExtraState


class Renaming(nn.Module):
    """Reads old names, with a hook; writes them too."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(64, 64)
        self.register_load_state_dict_pre_hook(_rename)
        self.register_state_dict_post_hook(_old_names)


def _rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for end in ("weight", "bias"):
        if f"{prefix}linear.{end}" in state:
            state[f"{prefix}w.{end}"] = state.pop(f"{prefix}linear.{end}")


def _old_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for end in ("weight", "bias"):
        state[f"{prefix}linear.{end}"] = state.pop(f"{prefix}w.{end}")


class Fusing(nn.Module):
    """Makes one weight of three, in an override; drops a tensor it has no use for."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for end in ("weight", "bias"):
            if f"{prefix}q.{end}" in state:
                parts = [state.pop(f"{prefix}{n}.{end}") for n in "qkv"]
                state[f"{prefix}qkv.{end}"] = torch.cat(parts) * 2
        state.pop(f"{prefix}unused", None)
        super()._load_from_state_dict(state, prefix, *rest)


def load(build: Any, folder: Path, **options: Any) -> nn.Module:
    with tuckaway.init_empty_weights():
        model = nn.ModuleDict({"a": build(), "b": build()})
    return tuckaway.load_and_quantize_model(
        model, FP32.replace(skip_modules=[]), folder, **{"device_map": {"": "cpu"}, **options}
    )


@pytest.mark.parametrize("build", [Renaming, Fusing])
def test_as_torch_would_load_it(tmp_path: Path, build: Any) -> None:
    torch.manual_seed(0)
    plain = nn.ModuleDict({"a": build(), "b": build()})
    state = plain.state_dict()
    if build is Fusing:
        state = {f"{m}.{n}.{e}": torch.randn(64, 64)[: 64 if e == "weight" else 1].squeeze()
                 for m in "ab" for n in "qkv" for e in ("weight", "bias")}  # fmt: skip
        state |= {"a.unused": torch.ones(1), "b.unused": torch.ones(1)}
    else:
        assert "a.linear.weight" in state
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "model.safetensors")
    plain.load_state_dict(dict(state))
    expected = tuckaway.load_and_quantize_model(plain, FP32.replace(skip_modules=[]), device_map={"": "cpu"})
    model = load(build, tmp_path / "model.safetensors")
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name) + 0, parameter + 0), name
    tuckaway.save_model(model, tmp_path / "again")
    again = load(build, tmp_path / "again", device_map={"": "disk"}, offload_folder=tmp_path / "pages")
    for name, parameter in expected.named_parameters():
        assert torch.equal(again.get_parameter(name) + 0, parameter + 0), name


class Failing(nn.Linear):
    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if state[f"{prefix}weight"].sum() > 0:
            raise AssertionError


def test_a_hook_that_needs_values(tmp_path: Path) -> None:
    tuckaway.save_model(nn.Sequential(Failing(8, 8)), tmp_path)
    model = nn.Sequential(Failing(8, 8))
    with refused(MismatchError, "a hook on loading a state failed", model):
        tuckaway.load_and_quantize_model(model, FP32, tmp_path)


def extra(scale: float) -> nn.Module:
    model = nn.Sequential(ExtraState(), ExtraState())
    model[1].scale = scale
    return model


def test_extra_state(tmp_path: Path) -> None:
    tuckaway.save_model(extra(3.5), tmp_path)
    assert read_all(tmp_path)["1._extra_state"].item() == 3.5
    model = extra(0.0)
    tuckaway.load_and_quantize_model(model, FP32, tmp_path, device_map={"": "cpu"})
    assert model[1].scale == 3.5
    torch.save(extra(2.5).state_dict(), tmp_path / "torch.bin")
    tuckaway.load_and_quantize_model(model, FP32, tmp_path / "torch.bin", device_map={"": "cpu"})
    assert model[1].scale == 2.5


def test_an_extra_state_that_is_missing(tmp_path: Path) -> None:
    state = {n: t for n, t in extra(1.0).state_dict().items() if n != "1._extra_state"}
    save_file(state, tmp_path / "model.safetensors")
    model = extra(0.5)
    with refused(KeyMismatch, r"1._extra_state", model):
        tuckaway.load_and_quantize_model(model, FP32, tmp_path)
    tuckaway.load_and_quantize_model(model, FP32, tmp_path, strict=False, device_map={"": "cpu"})
    assert model[1].scale == 0.5


def test_an_extra_state_that_is_no_tensor(tmp_path: Path) -> None:
    class Odd(ExtraState):
        def get_extra_state(self) -> Any:
            return {"scale": self.scale}

    with pytest.raises(ConfigError, match="an extra state is dict"):
        tuckaway.save_model(Odd(), tmp_path)
    assert not list(tmp_path.iterdir())
