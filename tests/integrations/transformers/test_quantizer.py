"""Plain transformers with ``quantization_config=TuckawayConfig(...)``, from transformers 5.0 to the newest."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache, pipeline

import tuckaway
from hf_models import KINDS, keys, saved, tokens
from tuckaway import PlanError, QuantizedTensor, TuckawayConfig

SUFFIXES = {
    "nf4": (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".nested_absmax", ".nested_quant_map"),
    "int8": (".SCB", ".weight_format"),
}


def load(folder: Path, format: str | None = None, **options: Any) -> Any:
    if format is not None:
        options["quantization_config"] = TuckawayConfig(format, compute_dtype=None)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def quantized_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def expected_keys(model: nn.Module, format: str) -> set[str]:
    """The names of the model's own state dict, and bitsandbytes' suffixes beside those that are quantized."""
    names = set(model.state_dict())
    for name in quantized_names(model):
        beside = name.removesuffix(".weight") if format == "int8" else name
        names |= {beside + suffix for suffix in SUFFIXES[format]}
    return names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantize_save_reload_save_again(kind: str, format: str, tmp_path: Path) -> None:
    plain = saved(kind, tmp_path / "plain")
    model = load(plain, format, dtype=torch.float32)
    model.save_pretrained(tmp_path / "once")
    again = load(tmp_path / "once")
    again.save_pretrained(tmp_path / "twice")
    assert quantized_names(again) == quantized_names(model) != set()
    expected = expected_keys(model, format)
    if kind == "gpt2":
        expected.remove("lm_head.weight")  # tied to the embedding
    assert set(keys(tmp_path / "once")) == expected
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_those_of_tuckaways_own_loader(kind: str, tmp_path: Path) -> None:
    plain = saved(kind, tmp_path / "plain")
    model = load(plain, "nf4", dtype=torch.bfloat16)
    own = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(plain), dtype=torch.bfloat16)
    state = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).state_dict()
    own.load_state_dict(state)
    own = tuckaway.load_and_quantize_model(
        own, tuckaway.QuantizationConfig(compute_dtype=None, dtype="bf16"), device_map="cpu"
    )
    assert quantized_names(own) == quantized_names(model)
    for name in quantized_names(own):
        assert torch.equal(own.get_parameter(name).codes, model.get_parameter(name).codes), name
        assert torch.equal(own.get_parameter(name).absmax, model.get_parameter(name).absmax), name


def test_expert_stacks_are_quantized_and_take_a_seventh(tmp_path: Path) -> None:
    model = load(saved("experts", tmp_path / "plain"), "nf4", dtype=torch.float32)
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert len(experts) == 4
    assert all(isinstance(p, QuantizedTensor) for p in experts)
    assert sum(p.nbytes for p in experts) < sum(p.numel() * 4 for p in experts) / 7


def test_footprint_is_exact(tmp_path: Path) -> None:
    model = load(saved("llama", tmp_path / "plain"), "nf4", dtype=torch.float32)
    stored = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert model.get_memory_footprint() == stored


def test_generate_and_pipeline_answer_alike(tmp_path: Path) -> None:
    model = load(saved("llama", tmp_path / "plain"), "nf4", dtype=torch.float32)
    model.generation_config.pad_token_id = 0
    text = model.generate(tokens(), max_new_tokens=5, do_sample=False)
    assert text.shape == (1, 15)
    pipe = pipeline("text-generation", model=model, tokenizer=words())
    prompt = " ".join(f"w{int(t)}" for t in tokens()[0])
    [answer] = pipe(prompt, max_new_tokens=5, do_sample=False, return_full_text=False)
    assert answer["generated_text"].split() == [f"w{int(t)}" for t in text[0, 10:]]


def words() -> Any:
    """A tokenizer whose tokens are called w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    level = Tokenizer(models.WordLevel({f"w{n}": n for n in range(128)}, unk_token="w0"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=level, clean_up_tokenization_spaces=False)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # of torch's own
def test_static_cache_under_torch_compile(tmp_path: Path) -> None:
    model = load(saved("llama", tmp_path / "plain"), "nf4", dtype=torch.float32)

    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def run(forward: Any) -> torch.Tensor:
        cache = {name: StaticCache(config=model.config, max_cache_len=32), "use_cache": True}
        with torch.no_grad():
            first = forward(tokens(), **cache).logits[:, -1:]
            second = forward(first.argmax(-1), position_ids=torch.tensor([[10]]), **cache).logits
        return torch.cat([first, second])

    torch.testing.assert_close(run(torch.compile(model.forward)), run(model), rtol=1e-4, atol=1e-5)


def test_saved_config_says_who_reads_it(tmp_path: Path) -> None:
    model = load(saved("llama", tmp_path / "plain"), "nf4")
    model.save_pretrained(tmp_path / "q")
    content = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert content["quant_method"] == "tuckaway"
    assert content["format"] == "nf4"


def test_dequantize_gives_the_same_plain_model(tmp_path: Path) -> None:
    model = load(saved("llama", tmp_path / "plain"), "nf4", dtype=torch.float32)
    before = model(tokens()).logits
    model = model.dequantize()
    assert quantized_names(model) == set()
    assert not getattr(model, "is_quantized", False)
    torch.testing.assert_close(model(tokens()).logits, before)


@pytest.mark.parametrize("device_map", ["disk", {"model": "disk", "lm_head": "cpu"}])
def test_disk_is_refused_by_name_of_what_can(device_map: Any, tmp_path: Path) -> None:
    plain = saved("llama", tmp_path / "plain")
    if device_map == "disk":
        device_map = {"": "disk"}
    with pytest.raises(PlanError, match=r"tuckaway\.from_pretrained"):
        load(plain, "nf4", device_map=device_map, offload_folder=tmp_path / "pages")


def test_a_name_that_matches_nothing_is_an_error_where_it_was_written(tmp_path: Path) -> None:
    plain = saved("llama", tmp_path / "plain")
    config = TuckawayConfig("nf4", skip_modules=["lm_haed"])
    with pytest.raises(tuckaway.ConfigError, match="lm_head"):
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)


def test_config_dtype_comes_first(tmp_path: Path) -> None:
    plain = saved("llama", tmp_path / "plain")
    config = TuckawayConfig("nf4", dtype="fp16")
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32)
    # transformers 5.0 asks the quantizer for a dtype, and then takes its own
    old = Version(transformers.__version__) < Version("5.4")
    assert {p.dtype for p in model.parameters()} == {torch.float32 if old else torch.float16}


@pytest.mark.parametrize("kind", ["llama", "experts"])
def test_offloaded_by_accelerate_stays_quantized(kind: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload

    model = load(saved(kind, tmp_path / "plain"), "nf4", dtype=torch.float32)
    before = model(tokens()).logits
    cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(model(tokens()).logits, before)


def test_automatic_map_counts_quantized_bytes(tmp_path: Path) -> None:
    plain = saved("llama", tmp_path / "plain")
    quantized = load(plain, "nf4", dtype=torch.float32)
    needed = int(quantized.get_memory_footprint())
    model = load(plain, "nf4", dtype=torch.float32, device_map="auto", max_memory={"cpu": 2 * needed})
    assert torch.equal(model(tokens()).logits, quantized(tokens()).logits)
    with pytest.raises(PlanError, match="disk"):  # where half of it would go
        load(
            plain,
            "nf4",
            dtype=torch.float32,
            device_map="auto",
            max_memory={"cpu": needed // 2},
            offload_folder=tmp_path / "pages",
        )
