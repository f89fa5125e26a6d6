"""``Accelerator`` around quantized models: prepared for inference and training, mixed precision, saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, load_checkpoint_in_model
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn

import tuckaway
from hf_models import saved, tokens
from tuckaway import QuantizationConfig
from tuckaway.paging import paging_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:DeprecationWarning"),
]
PLACES = ("resident", "paged")


@pytest.fixture(autouse=True)
def _no_state_of_others() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def load(folder: Path, place: str, **options: Any) -> Any:
    return tuckaway.from_pretrained(
        saved("llama", folder / "plain"),
        quantization_config=QuantizationConfig("nf4", compute_dtype=None),
        device_map={"": "disk" if place == "paged" else "cpu"},
        offload_folder=folder / "pages",
        **options,
    )


@pytest.mark.parametrize("place", PLACES)
def test_prepared_for_inference(place: str, tmp_path: Path) -> None:
    model = load(tmp_path, place)
    expected = model(tokens()).logits
    prepared = Accelerator(cpu=True).prepare_model(model, evaluation_mode=True)
    assert torch.equal(prepared(tokens()).logits, expected)
    assert (paging_of(model) is not None) == (place == "paged")


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("place", PLACES)
def test_prepared_for_training(place: str, precision: str, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = get_peft_model(load(tmp_path, place), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    accelerator.free_memory()


def test_what_accelerate_saves_of_plain_models_tuckaway_loads(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.Linear(64, 8))
    Accelerator(cpu=True).save_model(plain, tmp_path, max_shard_size="20kB")
    with tuckaway.init_empty_weights():
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.Linear(64, 8))
    config = QuantizationConfig("int8", compute_dtype=None, int8_threshold=None)
    model = tuckaway.load_and_quantize_model(model, config, tmp_path)
    x = torch.randn(3, 64)
    torch.testing.assert_close(model(x), plain(x), rtol=0.05, atol=0.05)


def test_dequantized_weights_are_saved_and_loaded_by_accelerate(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    model = tuckaway.load_and_quantize_model(model, QuantizationConfig("nf4", compute_dtype=None))
    x = torch.randn(3, 64)
    dequantized = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    state = {
        name: p.dequantize() if isinstance(p, tuckaway.QuantizedTensor) else p
        for name, p in model.named_parameters()
    }
    dequantized.load_state_dict(state)
    Accelerator(cpu=True).save_model(dequantized, tmp_path)
    again = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    load_checkpoint_in_model(again, tmp_path)
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize("place", PLACES)
def test_accelerate_saves_quantized_weights_as_tuckaway_does(place: str, tmp_path: Path) -> None:
    model = load(tmp_path, place)
    expected = model(tokens()).logits
    accelerator = Accelerator(cpu=True)
    accelerator.save_model(
        accelerator.prepare_model(model, evaluation_mode=True), tmp_path / "theirs", "20kB"
    )
    tuckaway.save_model(model, tmp_path / "ours", "20kB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir() if path.is_file()}
    assert len(files) > 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "theirs").iterdir() if p.is_file()} == files
    again = tuckaway.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again(tokens()).logits, expected)
