"""``TuckawayConfig``: the fields of ``QuantizationConfig`` in transformers' clothes."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
import torch
from transformers.quantizers.auto import AutoQuantizationConfig

from tuckaway import ConfigError, QuantizationConfig, TuckawayConfig

CONFIGS = [
    QuantizationConfig(),
    QuantizationConfig("int8", int8_threshold=None, compute_dtype="fp16", dtype="fp32"),
    QuantizationConfig(
        nested=False, blocksize=128, skip_modules=["lm_head", "a.*"], quantize_embeddings=True
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_there_and_back(config: QuantizationConfig) -> None:
    theirs = TuckawayConfig(config)
    assert theirs.quantization_config() == config
    assert QuantizationConfig.of(theirs) == config
    content = json.loads(json.dumps(theirs.to_dict()))
    assert TuckawayConfig.from_dict(content) == theirs
    assert QuantizationConfig.of(content) == config
    assert AutoQuantizationConfig.from_dict(content) == theirs


def test_has_the_fields_of_tuckaways_own() -> None:
    names = [field.name for field in dataclasses.fields(QuantizationConfig)]
    assert list(inspect.signature(TuckawayConfig).parameters) == names
    config = TuckawayConfig("fp4", False, 128)
    assert (config.format, config.nested, config.blocksize) == ("fp4", False, 128)
    assert config.compute_dtype is torch.bfloat16


def test_prints_what_is_not_default() -> None:
    assert json.loads(TuckawayConfig(blocksize=128).to_json_string()) == {
        "quant_method": "tuckaway",
        "blocksize": 128,
    }
    assert "blocksize" in repr(TuckawayConfig(blocksize=128))


def test_unknown_fields_and_values_are_named() -> None:
    with pytest.raises(ConfigError, match="blocksize"):
        TuckawayConfig(blocksise=64)
    with pytest.raises(ConfigError, match="nf4"):
        TuckawayConfig("nf5")
