"""peft on quantized weights, resident and paged: trained, saved, loaded, merged by peft's own functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file

import tuckaway
from hf_models import saved, tokens
from tuckaway import QuantizationConfig, QuantizedTensor
from tuckaway.paging import paging_of

# peft asks the newest transformers by names of the one before
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "experts": (
        "experts",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}
PLACES = ("resident", "paged")
WIDEST = {"nf4": 0.6, "int8": 0.03}
"""Change of the logits, relative to the adapter's, that quantizing a merged weight anew may make."""


class Bench:
    """Models of one kind, format and place, all with the same weights."""

    def __init__(self, kind: str, format: str, place: str, folder: Path) -> None:
        self.model_kind, self.options = KINDS[kind]
        self.format, self.place, self.folder = format, place, folder
        saved(self.model_kind, folder / "plain")
        self.count = 0

    def base(self) -> Any:
        config = QuantizationConfig(self.format, compute_dtype=None, int8_threshold=None)
        self.count += 1
        return tuckaway.from_pretrained(
            self.folder / "plain",
            quantization_config=config,
            device_map={"": "disk" if self.place == "paged" else "cpu"},
            offload_folder=self.folder / f"pages{self.count}",
        )

    def adapted(self) -> Any:
        torch.manual_seed(2)
        config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **self.options)
        return get_peft_model(self.base(), config).eval()


@pytest.fixture(params=[(k, f, p) for k in KINDS for f in ("nf4", "int8") for p in PLACES], ids="-".join)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return Bench(*request.param, tmp_path)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits  # type: ignore[no-any-return]


def train_a_step(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_gradients_are_those_on_the_dequantized_base(bench: Bench) -> None:
    model = bench.adapted()
    gradients = train_a_step(model)
    plain = bench.base()
    tuckaway.materialize(plain)
    plain = plain.dequantize()
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **bench.options)
    expected = train_a_step(get_peft_model(plain, config))
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_saved_by_peft_and_loaded_by_peft(bench: Bench) -> None:
    if bench.model_kind == "experts" and Version(transformers.__version__) < Version("5.4"):
        pytest.skip("peft 0.21 renames experts' adapters with a function that transformers 5.0 has not")
    model = bench.adapted()
    before = logits(model)
    model.save_pretrained(bench.folder / "adapter")
    names = load_file(bench.folder / "adapter/adapter_model.safetensors")
    assert names
    assert all("lora_" in name for name in names)
    again = PeftModel.from_pretrained(bench.base(), bench.folder / "adapter")
    assert torch.equal(logits(again), before)
    inner = again.get_base_model()
    assert (paging_of(inner) is not None) == (bench.place == "paged")
    assert set(inner.hf_device_map.values()) == {"disk" if bench.place == "paged" else "cpu"}


@pytest.mark.parametrize("safe", [False, True])
def test_merged_unmerged_and_unloaded(bench: Bench, safe: bool) -> None:
    model = bench.adapted()
    with model.disable_adapter():
        without = logits(model)
    adapted = logits(model)
    far = distance(without, adapted)
    model.merge_adapter(safe_merge=safe)
    merged = logits(model)
    assert distance(merged, adapted) < WIDEST[bench.format] * far
    model.unmerge_adapter()
    assert distance(logits(model), adapted) < WIDEST[bench.format] * far
    with model.disable_adapter():
        assert distance(logits(model), without) < WIDEST[bench.format]
    unloaded = bench.adapted().merge_and_unload(safe_merge=safe)
    assert torch.equal(logits(unloaded), merged)
    assert any(isinstance(p, QuantizedTensor) for p in unloaded.parameters())


@pytest.mark.parametrize("place", PLACES)
def test_merging_quantizes_the_sum(place: str, tmp_path: Path) -> None:
    bench = Bench("lora", "nf4", place, tmp_path)
    model = bench.adapted()
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_base_model().get_submodule(name)
    before = tuckaway.materialize(bench.base()).get_submodule(name).weight
    total = before.dequantize(torch.float32) + layer.get_delta_weight("default").detach()
    config = QuantizationConfig("nf4", compute_dtype=None)
    expected = tuckaway.quantize(total, config)
    merged = model.merge_and_unload()
    after = tuckaway.materialize(merged).get_submodule(name).weight
    assert torch.equal(after.codes, expected.codes)
    assert torch.equal(after.absmax, expected.absmax)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", PLACES)
def test_prepared_for_training(place: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tuckaway.from_pretrained(
        saved("llama", tmp_path / "plain"),
        quantization_config="nf4",
        dtype=dtype,
        device_map={"": "disk" if place == "paged" else "cpu"},
        offload_folder=tmp_path / "pages",
    )
    codes = model.get_memory_footprint()
    model = prepare_model_for_kbit_training(model)
    quantized = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    assert sum(p.nbytes for p in quantized) < codes
    assert not any(p.requires_grad for p in model.parameters())
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    gradients = train_a_step(model)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_transformers_own_loading_of_adapters_is_refused_on_pages(tmp_path: Path) -> None:
    bench = Bench("lora", "nf4", "paged", tmp_path)
    bench.adapted().save_pretrained(tmp_path / "adapter")
    with pytest.raises(tuckaway.PagingError, match=r"PeftModel\.from_pretrained"):
        bench.base().load_adapter(str(tmp_path / "adapter"))
