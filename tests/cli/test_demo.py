"""The demo on a tiny model in every format, and its default budget on the real one's sizes."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tuckaway
from tuckaway.cli.demo import default_budget, run_demo
from tuckaway.cli.options import parse_max_memory
from tuckaway.cli.show import Screen
from tuckaway.errors import CheckpointNotFound, PlanError
from tuckaway.plan import choose_specs, resolve_device_map


def demo(model: Path, *, format: str = "nf4", max_memory: str | None = None, tokens: int = 12) -> str:
    out = io.StringIO()
    screen = Screen(Console(file=out, highlight=False))
    run_demo(
        format=format,
        max_memory=None if max_memory is None else parse_max_memory(max_memory),
        prompt="Hello",
        model=str(model),
        max_new_tokens=tokens,
        screen=screen,
    )
    return out.getvalue()


def answer(printed: str) -> str:
    found = re.search(r"> Hello\n(.*)\n\n(\d+ tokens|$)", printed, re.DOTALL)
    assert found is not None, printed
    return found[1]


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_every_placement_is_in_use_and_the_answer_is_the_resident_models(
    format: str, tiny_llama: Path
) -> None:
    spread = demo(tiny_llama, format=format)
    places = {line.split()[0] for line in spread.splitlines() if re.match(r"  (\d+|cpu|disk) +\w", line)}
    assert places == ({"0", "cpu", "disk"} if torch.accelerator.is_available() else {"cpu", "disk"})
    assert re.search(rf"weights now: .*{format} ", spread)
    assert "12 tokens, " in spread
    resident = demo(
        tiny_llama, format=format, max_memory="0=1GB" if torch.accelerator.is_available() else "cpu=1GB"
    )
    assert "disk" not in resident
    assert answer(resident) == answer(spread)


def test_answer_is_what_the_model_says(tiny_llama: Path) -> None:
    """Against a loop without a cache over the same quantized weights, resident."""
    with tuckaway.init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_llama))
    gpu = torch.accelerator.is_available()
    config = tuckaway.QuantizationConfig(compute_dtype=torch.bfloat16 if gpu else torch.float32)
    model = tuckaway.load_and_quantize_model(model.eval(), config, tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokens = tokenizer("Hello", return_tensors="pt").input_ids.to(model.device)
    length = tokens.shape[1]
    with torch.no_grad():
        for _ in range(8):
            tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(tokens[0, length:], skip_special_tokens=True)
    assert answer(demo(tiny_llama, tokens=8)) == expected.rstrip("\N{REPLACEMENT CHARACTER}")


def test_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="Hub"):
        demo(tmp_path / "nothing")


def test_budget_that_is_too_small(tiny_llama: Path) -> None:
    with pytest.raises(PlanError):
        demo(tiny_llama, max_memory="cpu=1kB")


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_default_budget_spreads_the_real_model(format: str, accelerator: bool, smollm2: Path) -> None:
    """Also over a GPU that is not there: planning for one needs none."""
    if torch.accelerator.is_available() and not accelerator:
        pytest.skip("an accelerator is there and executes")
    with tuckaway.init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(smollm2))
    specs, _ = choose_specs(model, tuckaway.QuantizationConfig(format=format))
    blocks = [f"model.layers.{i}" for i in range(30)]
    budget = default_budget(model, specs, blocks, accelerator=accelerator)
    placement = resolve_device_map(model, specs, "auto", max_memory=budget)
    counts = [list(placement.values()).count(place) for place in sorted(set(placement.values()), key=str)]
    assert len(counts) == (3 if accelerator else 2)
    assert min(counts) >= 5
    # the planner counts for a placement what the budget was made of
    planned = tuckaway.plan(model, format, max_memory=budget, reserve_bytes=0)
    assert planned.device_map == placement
    assert all(planned.on(device).counted_bytes <= size for device, size in budget.items())
