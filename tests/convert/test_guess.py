"""A model from names and shapes: what each tensor is taken for, and what the rules then say of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tuckaway import QuantizationConfig
from tuckaway.checkpoint import Checkpoint
from tuckaway.convert.decide import decide
from tuckaway.convert.guess import guess_model

CONFIG = QuantizationConfig(compute_dtype=None)


def checkpoint(folder: Path, **shapes: tuple[int, ...]) -> Checkpoint:
    """Write zeros under names whose dots are written ``__``."""
    tensors = {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


def quantized(found: Checkpoint) -> set[str]:
    return {row.name for row in decide(found, CONFIG).report.quantized}


def test_linear_layers_and_what_surrounds_them(tmp_path):
    found = checkpoint(
        tmp_path,
        model__embed_tokens__weight=(100, 64),
        model__layers__0__mlp__up_proj__weight=(128, 64),
        model__layers__0__mlp__up_proj__bias=(128,),
        model__layers__0__input_layernorm__weight=(64,),
        model__layers__0__self_attn__in_proj_weight=(192, 64),
        lm_head__weight=(100, 64),
    )
    assert quantized(found) == {
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.in_proj_weight",
    }
    reasons = {row.name: row.reason for row in decide(found, CONFIG).report.unquantized}
    assert reasons["lm_head.weight"] == "the output head"
    assert "embedding" in reasons["model.embed_tokens.weight"]


def test_a_bias_turns_a_weight_round(tmp_path):
    model = guess_model(
        checkpoint(
            tmp_path,
            h__0__attn__c_attn__weight=(64, 192),
            h__0__attn__c_attn__bias=(192,),
            h__0__attn__c_proj__weight=(64, 64),
            h__0__attn__c_proj__bias=(64,),
            h__0__mlp__c_proj__weight=(256, 64),
            h__0__mlp__c_proj__bias=(64,),
            h__0__other__weight=(256, 64),
            h__0__other__bias=(256,),
        )
    )
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["h.0.attn.c_attn"] == kinds["h.0.attn.c_proj"] == kinds["h.0.mlp.c_proj"] == "Conv1D"
    assert kinds["h.0.other"] == "Linear"


def test_routers_experts_and_recurrent_weights(tmp_path):
    found = checkpoint(
        tmp_path,
        layers__0__mlp__gate__weight=(64, 64),
        layers__0__mlp__experts__0__up_proj__weight=(64, 64),
        layers__1__mlp__gate__weight=(64, 64),
        layers__1__mlp__experts__gate_up_proj=(4, 128, 64),
        rnn__weight_ih_l0=(256, 64),
        rnn__weight_hh_l0=(256, 64),
        lm_head__weight=(64, 64),
    )
    assert quantized(found) == {
        "layers.0.mlp.experts.0.up_proj.weight",
        "layers.1.mlp.gate.weight",  # no experts of its own, each by itself: a gated layer's gate
        "layers.1.mlp.experts.gate_up_proj",
    }


def test_convolutions(tmp_path):
    found = checkpoint(
        tmp_path, conv__weight=(64, 64, 3, 3), deep__weight=(64, 1, 3, 3), tail__weight=(8, 64)
    )
    model = guess_model(found)
    assert isinstance(model.conv, nn.Conv2d)
    assert quantized(found) == {"conv.weight"}  # a depthwise one is few weights; the last child is the head


def test_lists_come_in_the_order_of_their_numbers(tmp_path):
    found = checkpoint(tmp_path, **{f"{n}__weight": (64, 64) for n in (0, 2, 10)})
    assert [name for name, _ in guess_model(found).named_children()] == ["0", "2", "10"]
    assert quantized(found) == {"0.weight", "2.weight"}


@pytest.mark.parametrize("name", ["forward", "type", "double", "training", "_modules", "_guessed_head", "T"])
def test_names_that_modules_have_themselves(tmp_path, name):
    found = checkpoint(tmp_path, **{f"{name}__{name}__weight": (64, 64), "b": (3,), "z__weight": (64, 64)})
    model = guess_model(found)
    assert {key for key, _ in model.named_parameters()} == {f"{name}.{name}.weight", "b", "z.weight"}


def test_a_tensor_and_a_module_of_one_name(tmp_path):
    found = checkpoint(tmp_path, a=(64, 64), a__b__weight=(64, 64), z__weight=(64, 64))
    assert {key for key, _ in guess_model(found).named_parameters()} == {"a", "a.b.weight", "z.weight"}
