from __future__ import annotations

import pytest
import torch
from torch import nn

from tuckaway.config import QuantizationConfig
from tuckaway.plan import choose_specs
from tuckaway.plan.skeleton import skeleton_of

BF16 = torch.bfloat16
LLAMA = {
    "lm_head.weight": ((100, 64), BF16),
    "model.embed_tokens.weight": ((100, 64), BF16),
    "model.norm.weight": ((64,), BF16),
    **{f"model.layers.{i}.mlp.up.weight": ((128, 64), BF16) for i in range(11)},
    **{f"model.layers.{i}.mlp.up.bias": ((128,), BF16) for i in range(11)},
    **{f"model.layers.{i}.norm.weight": ((64,), BF16) for i in range(11)},
    "model.layers.3.router": ((64, 4), torch.float32),
}


def test_names_shapes_and_dtypes_are_those_of_the_checkpoint():
    model = skeleton_of(LLAMA)
    assert {n: (tuple(p.shape), p.dtype) for n, p in model.named_parameters()} == LLAMA
    assert all(p.is_meta for p in model.parameters())


def test_what_modules_are_told_to_be():
    model = skeleton_of(LLAMA)
    assert isinstance(model.model.layers, nn.ModuleList)
    assert isinstance(model.model.embed_tokens, nn.Embedding)
    assert isinstance(model.model.layers[10].mlp.up, nn.Linear)
    specs, reasons = choose_specs(model, QuantizationConfig())
    assert specs["model.layers.10.mlp.up.weight"].layout is not None
    assert reasons["lm_head.weight"] == "the output head"
    assert "embedding" in reasons["model.embed_tokens.weight"]
    with pytest.raises(NotImplementedError, match="for planning"):
        model()


def test_nothing_and_one_tensor():
    assert list(skeleton_of({}).parameters()) == []
    assert skeleton_of({"w": ((3, 2), BF16)}).w.shape == (3, 2)
