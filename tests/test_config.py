"""What a config accepts, refuses, and reads from the configs of others without changing them."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from typing import Any

import pytest
import torch
from accelerate.utils import BnbQuantizationConfig
from transformers import BitsAndBytesConfig

from tuckaway.config import FORMATS, QuantizationConfig, as_dtype
from tuckaway.errors import ConfigError
from tuckaway.formats import registered_formats


class TestOwn:
    def test_defaults(self) -> None:
        config = QuantizationConfig()
        assert (config.format, config.nested, config.blocksize) == ("nf4", True, 64)
        assert (config.compute_dtype, config.dtype, config.int8_threshold) == (torch.bfloat16, None, 6.0)
        assert (config.skip_modules, config.keep_in_fp32_modules, config.quantize_embeddings) == (
            None,
            None,
            False,
        )
        assert config.plain_dtype == torch.bfloat16

    def test_knows_all_registered_formats(self) -> None:
        assert set(FORMATS) == set(registered_formats())

    @pytest.mark.parametrize(
        ("written", "dtype"),
        [
            (None, None),
            (torch.float16, torch.float16),
            ("float32", torch.float32),
            ("torch.bfloat16", torch.bfloat16),
            ("bf16", torch.bfloat16),
            ("half", torch.float16),
            ("fp32", torch.float32),
        ],
    )
    def test_dtypes_as_people_write_them(self, written: Any, dtype: torch.dtype | None) -> None:
        assert as_dtype(written, "dtype") is dtype
        config = QuantizationConfig(compute_dtype=written, dtype=written)
        assert config.compute_dtype is config.dtype is config.plain_dtype is dtype

    def test_lists_become_tuples_so_that_it_is_hashable(self) -> None:
        names = ["lm_head"]
        config = QuantizationConfig(skip_modules=names, keep_in_fp32_modules=(n for n in names))  # type: ignore[arg-type]
        assert config.skip_modules == config.keep_in_fp32_modules == ("lm_head",)
        names.append("wte")
        assert config.skip_modules == ("lm_head",)
        assert hash(config) == hash(config.replace())

    def test_is_frozen_and_replaced(self) -> None:
        config = QuantizationConfig()
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.format = "int8"  # type: ignore[misc]
        assert config.replace(format="fp4", dtype="fp16").dtype == torch.float16
        with pytest.raises(ConfigError):
            config.replace(blocksize=0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"format": "nf5"}, "unknown format 'nf5'. did you mean 'nf4'"),
            ({"format": "gguf"}, "known are nf4, fp4, int8"),
            ({"format": None}, "unknown format None"),
            ({"format": ["nf4"]}, "unknown format"),
            *(
                ({"blocksize": size}, "blocksize cannot be")
                for size in (0, 16, 48, 8192, -64, 64.0, True, "64", None)
            ),
            *(({"int8_threshold": t}, "int8_threshold cannot be") for t in (-1.0, float("nan"), "6", True)),
            *(({"nested": value}, "nested must be True or False") for value in ("no", None, 1)),
            ({"quantize_embeddings": "yes"}, "quantize_embeddings must be"),
            *(
                ({"compute_dtype": d}, "compute_dtype cannot be")
                for d in ("int8", "nn", torch.int8, torch.float64, 16)
            ),
            ({"dtype": "auto"}, "dtype cannot be 'auto'"),
            *(({"skip_modules": n}, "skip_modules must be a list") for n in ("lm_head", [1], 5, {"a": 1})),
            ({"keep_in_fp32_modules": "norm"}, "keep_in_fp32_modules must be a list"),
            ({"only_modules": "h"}, "only_modules must be a list"),
            ({"only_modules": ["re:h[.]("]}, "is no regular expression"),
            ({"formats": ["nf4"]}, "formats must be a dict"),
            ({"formats": {1: "nf4"}}, "formats must be a dict"),
            ({"formats": {"h": "nf5"}}, "unknown format 'nf5'. did you mean 'nf4'"),
            *(({"min_weights": n}, "min_weights cannot be") for n in (-1, 1.5, True, None)),
            ({"quantize_head": None}, "quantize_head must be"),
        ],
    )
    def test_refuses(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            QuantizationConfig(**options)

    def test_goes_through_json(self) -> None:
        config = QuantizationConfig(
            "int8",
            compute_dtype=torch.float16,
            skip_modules=[re.compile("H[.]1", re.IGNORECASE), "lm_head"],
            only_modules=[],
            formats={re.compile("h[.]2"): None, "*.mlp": "nf4"},
            min_weights=100,
            quantize_head=True,
        )
        content = json.loads(json.dumps(config.to_dict()))
        assert content["skip_modules"] == ["re:(?i)H[.]1", "lm_head"]
        assert content["formats"] == {"re:h[.]2": None, "*.mlp": "nf4"}
        assert QuantizationConfig.from_dict(content) == QuantizationConfig.of(content) == config
        assert hash(QuantizationConfig.from_dict(content)) == hash(config)
        assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
        with pytest.raises(ConfigError, match=r"no field 'formatt'. did you mean 'format' or 'formats'"):
            QuantizationConfig.from_dict({"formatt": "nf4"})

    def test_a_checkpoint_keeps_what_bitsandbytes_cannot_say(self) -> None:
        config = QuantizationConfig(blocksize=128, dtype="fp16", formats={"a": None}, int8_threshold=None)
        content = config.to_bitsandbytes()
        assert QuantizationConfig.of(content) == config
        assert BitsAndBytesConfig.from_dict(json.loads(json.dumps(content))).bnb_4bit_quant_type == "nf4"

    @pytest.mark.parametrize("threshold", [None, 0.0, 0, 6, 1e9])
    def test_thresholds(self, threshold: float | None) -> None:
        assert QuantizationConfig(format="int8", int8_threshold=threshold).int8_threshold == threshold


OTHERS = [
    pytest.param(
        lambda: BnbQuantizationConfig(load_in_8bit=True),
        QuantizationConfig("int8", nested=False, compute_dtype="fp16", dtype="fp16"),
        id="accelerate-8bit",
    ),
    pytest.param(
        lambda: BnbQuantizationConfig(load_in_8bit=True, llm_int8_threshold=0.0, skip_modules=["head"]),
        QuantizationConfig(
            "int8",
            nested=False,
            compute_dtype="fp16",
            dtype="fp16",
            int8_threshold=0.0,
            skip_modules=["head"],
        ),
        id="accelerate-8bit-threshold",
    ),
    pytest.param(
        lambda: BnbQuantizationConfig(load_in_4bit=True),
        QuantizationConfig("fp4", nested=False, compute_dtype="fp16", dtype="fp16"),
        id="accelerate-4bit",
    ),
    pytest.param(
        lambda: BnbQuantizationConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="bf16",
            torch_dtype="fp32",
            skip_modules=["lm_head"],
            keep_in_fp32_modules=["ln_f"],
        ),
        QuantizationConfig(dtype="fp32", skip_modules=["lm_head"], keep_in_fp32_modules=["ln_f"]),
        id="accelerate-nf4",
    ),
    pytest.param(
        lambda: BitsAndBytesConfig(load_in_4bit=True),
        QuantizationConfig("fp4", nested=False, compute_dtype="fp32"),
        id="transformers-4bit",
    ),
    pytest.param(
        lambda: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head"],
        ),
        QuantizationConfig(skip_modules=["lm_head"]),
        id="transformers-nf4",
    ),
    pytest.param(
        lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.0),
        QuantizationConfig("int8", nested=False, compute_dtype="fp16", int8_threshold=3.0),
        id="transformers-8bit",
    ),
    pytest.param(
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict(),
        QuantizationConfig(nested=False, compute_dtype="fp32"),
        id="dict",
    ),
    pytest.param(
        lambda: {"load_in_8bit": True},
        QuantizationConfig("int8", nested=False, compute_dtype="fp16"),
        id="short-dict",
    ),
    pytest.param(lambda: "int8", QuantizationConfig("int8"), id="name"),
    pytest.param(
        lambda: QuantizationConfig("fp4", blocksize=128), QuantizationConfig("fp4", blocksize=128), id="ours"
    ),
]


@pytest.mark.parametrize(("make", "expected"), OTHERS)
def test_of_others(make: Any, expected: QuantizationConfig) -> None:
    given = make()
    before = copy.deepcopy(getattr(given, "__dict__", given))
    assert QuantizationConfig.of(given) == expected
    assert getattr(given, "__dict__", given) == before
    assert QuantizationConfig.of(given) == expected


class Both:
    load_in_4bit = load_in_8bit = True


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "NoneType is no quantization config"),
        (5, "int is no quantization config"),
        ({}, "dict is no quantization config"),
        ("nf5", "unknown format 'nf5'"),
        (Both(), "both of 4 and 8 bits"),
        ({"load_in_4bit": False, "load_in_8bit": False}, "neither of 4 and 8 bits"),
        (BitsAndBytesConfig(), "neither of 4 and 8 bits"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq' are not known"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, "unknown format 'nf3'"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int4"}, "bnb_4bit_compute_dtype cannot be"),
        ({"load_in_8bit": True, "llm_int8_threshold": "six"}, "int8_threshold cannot be"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": "lm_head"}, "skip_modules must be a list"),
    ],
)
def test_of_what_is_none(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizationConfig.of(given)


@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig(),
        QuantizationConfig("fp4", nested=False, compute_dtype="fp32", skip_modules=["a", "b.c"]),
        QuantizationConfig("int8", nested=False, compute_dtype="fp16", int8_threshold=3.5),
    ],
)
def test_what_transformers_reads_comes_back(config: QuantizationConfig) -> None:
    written = config.to_bitsandbytes()
    read = BitsAndBytesConfig.from_dict(dict(written))
    assert (read.load_in_4bit, read.load_in_8bit) == (config.format != "int8", config.format == "int8")
    assert QuantizationConfig.of(written) == QuantizationConfig.of(read) == config
