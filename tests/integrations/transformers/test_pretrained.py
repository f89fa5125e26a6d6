"""``tuckaway.from_pretrained``: what transformers' own does, through tuckaway's loader, without its limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

import tuckaway
from hf_models import KINDS, config_of, keys, saved, tokens
from tuckaway import QuantizationConfig, QuantizedTensor, TuckawayConfig

EXACT = QuantizationConfig("nf4", compute_dtype=None)


def theirs(folder: Path, format: str = "nf4", **options: Any) -> Any:
    config = TuckawayConfig(format, compute_dtype=None)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_model_as_transformers_own(kind: str, format: str, place: str, tmp_path: Path) -> None:
    plain = saved(kind, tmp_path / "plain")
    model = tuckaway.from_pretrained(
        plain,
        quantization_config=QuantizationConfig(format, compute_dtype=None),
        device_map={"": place},
        offload_folder=tmp_path / "pages",
    )
    expected = theirs(plain, format)
    assert model.dtype == expected.dtype
    assert not model.training
    assert torch.equal(model(tokens()).logits, expected(tokens()).logits)
    assert model.get_memory_footprint() == expected.get_memory_footprint()
    assert set(model.hf_device_map.values()) == {place}
    assert model.device == torch.device("cpu")  # where inputs go, wherever the weights are


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_saves_the_same_bytes_as_transformers_own(kind: str, place: str, tmp_path: Path) -> None:
    plain = saved(kind, tmp_path / "plain")
    model = tuckaway.from_pretrained(
        plain, quantization_config=EXACT, device_map=place, offload_folder=tmp_path / "pages"
    )
    model.save_pretrained(tmp_path / "a")
    theirs(plain).save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in "ab"]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("kind", KINDS)
def test_loads_what_plain_transformers_saved_and_plain_transformers_what_it_saved(
    kind: str, tmp_path: Path
) -> None:
    model = theirs(saved(kind, tmp_path / "plain"))
    model.save_pretrained(tmp_path / "q")
    again = tuckaway.from_pretrained(tmp_path / "q", device_map={"": "disk"}, offload_folder=tmp_path / "p")
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    tuckaway.save_model(again, tmp_path / "own")
    assert keys(tmp_path / "own") == keys(tmp_path / "q")
    once_more = tuckaway.from_pretrained(tmp_path / "own")
    assert torch.equal(once_more(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_unquantized_too(kind: str, tmp_path: Path) -> None:
    plain = saved(kind, tmp_path / "plain")
    model = tuckaway.from_pretrained(plain)
    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())
    expected = AutoModelForCausalLM.from_pretrained(plain)
    assert torch.equal(model(tokens()).logits, expected(tokens()).logits)
    model.save_pretrained(tmp_path / "again")
    assert keys(tmp_path / "again") == keys(plain)


def test_experts_are_fused_on_the_way(tmp_path: Path) -> None:
    plain = saved("experts", tmp_path / "plain")
    assert any(".experts.3.gate_proj.weight" in key for key in keys(plain))
    model = tuckaway.from_pretrained(plain, quantization_config="nf4", strict=True)
    stack = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
    assert isinstance(stack, QuantizedTensor)
    assert stack.shape == (4, 128, 64)


def test_old_names_and_a_missing_prefix(tmp_path: Path) -> None:
    plain = saved("llama", tmp_path / "plain")
    state = load_file(plain / "model.safetensors")
    old = {}
    for key, tensor in state.items():
        key = key.removeprefix("model.").replace("input_layernorm.weight", "input_LayerNorm.gamma")
        old[key.replace("self_attn", "attention")] = tensor
    save_file(old, plain / "model.safetensors")
    model = tuckaway.from_pretrained(
        plain,
        key_mapping={r"\.attention\.": ".self_attn.", "input_LayerNorm.gamma": "input_layernorm.weight"},
    )
    loaded = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(loaded, old["layers.0.attention.q_proj.weight"])


def test_generation_config_and_attributes_of_the_configuration(tmp_path: Path) -> None:
    plain = saved("llama", tmp_path / "plain")
    GenerationConfig(max_new_tokens=3, pad_token_id=0, eos_token_id=None).save_pretrained(plain)
    model = tuckaway.from_pretrained(plain, quantization_config="nf4", use_cache=False)
    assert model.config.use_cache is False
    assert model.generate(tokens()).shape == (1, 13)


def test_class_and_attention_are_chosen(tmp_path: Path) -> None:
    plain = saved("llama", tmp_path / "plain")
    model = tuckaway.from_pretrained(
        plain, model_class=LlamaForCausalLM, attn_implementation="eager", dtype="bf16"
    )
    assert type(model) is LlamaForCausalLM
    assert model.config._attn_implementation == "eager"
    assert model.dtype is torch.bfloat16
    base = tuckaway.from_pretrained(plain, model_class="AutoModel", quantization_config="nf4")
    assert type(base).__name__ == "LlamaModel"
    assert isinstance(base.layers[0].mlp.up_proj.weight, QuantizedTensor)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    plain = saved("llama", tmp_path / "plain")
    with pytest.raises(tuckaway.ConfigError, match="attn_implementatio"):
        tuckaway.from_pretrained(plain, attn_implementatio="eager")
    with pytest.raises(tuckaway.PlanError, match="offload_folder"):
        tuckaway.from_pretrained(plain, device_map={"": "disk"})
    with pytest.raises(tuckaway.ConfigError, match="lm_head"):
        tuckaway.from_pretrained(plain, quantization_config=TuckawayConfig(skip_modules=["lm_haed"]))
    (plain / "config.json").write_text(
        json.dumps(
            {
                **json.loads((plain / "config.json").read_text()),
                "quantization_config": {"quant_method": "gptq"},
            }
        )
    )
    with pytest.raises(tuckaway.ConfigError, match="gptq"):
        tuckaway.from_pretrained(plain)


def test_experts_that_do_not_fit_the_configuration_are_named(tmp_path: Path) -> None:
    plain = saved("experts", tmp_path / "plain")
    state = load_file(plain / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    state[name] = state[name][:, :-1].contiguous()
    save_file(state, plain / "model.safetensors")
    with pytest.raises(tuckaway.MismatchError, match=r"layers\.1\.mlp\.experts"):
        tuckaway.from_pretrained(plain, quantization_config="nf4")


@pytest.mark.parametrize("bits", [4, 8])
def test_reads_bitsandbytes_folders_without_bitsandbytes(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BitsAndBytesConfig

    plain = saved("llama", tmp_path / "plain")
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    own = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    expected = own(tokens()).logits
    own.save_pretrained(tmp_path / "bnb")
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    model = tuckaway.from_pretrained(tmp_path / "bnb", device_map={"": "disk"}, offload_folder=tmp_path / "p")
    assert model.model.layers[0].mlp.up_proj.weight.format == ("nf4" if bits == 4 else "int8")
    torch.testing.assert_close(model(tokens()).logits.float(), expected, rtol=0.02, atol=0.02)
    # plain transformers takes it too, when the configuration says whose it is
    changed = config_of("llama")
    changed.quantization_config = TuckawayConfig(
        QuantizationConfig.of(model.config.quantization_config)
    ).to_dict()
    plainly = AutoModelForCausalLM.from_pretrained(tmp_path / "bnb", config=changed, dtype=model.dtype)
    assert torch.equal(plainly(tokens()).logits, model(tokens()).logits)
