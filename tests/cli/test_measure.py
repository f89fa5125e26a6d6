"""Speed and perplexity, compared with their definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuckaway.cli.answer import Watch
from tuckaway.cli.measure import perplexity, speed
from tuckaway.errors import ConfigError


@pytest.fixture(scope="module")
def network(tiny_llama: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def test_perplexity_is_exp_of_the_mean_loss(
    network: torch.nn.Module, tiny_llama: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = tmp_path / "text.txt"
    text.write_text("Some words to be measured, and an é. " * 8, encoding="utf-8")
    found = perplexity(network, tokenizer, text, 200)
    tokens = torch.tensor(tokenizer(text.read_text(encoding="utf-8"))["input_ids"])[:200]
    with torch.no_grad():
        loss = network(tokens[None], labels=tokens[None]).loss
    assert found["tokens"] == 200
    assert found["value"] == pytest.approx(loss.exp().item(), rel=1e-5)


def test_a_text_of_one_token_has_none(network: torch.nn.Module, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(ConfigError, match="fewer than two"):
        perplexity(network, AutoTokenizer.from_pretrained(tiny_llama), tmp_path / "text.txt", 10)


def test_every_run_is_as_long_as_asked(network: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    original = Watch.__call__

    def counted(watch: Watch, input_ids: torch.Tensor, scores: object, **rest: object) -> torch.Tensor:
        lengths.append(input_ids.shape[1])
        return original(watch, input_ids, scores, **rest)

    monkeypatch.setattr(Watch, "__call__", counted)
    found = speed(network, prompt_tokens=5, new_tokens=3, batch=2, repeat=2)
    assert lengths == [6, 7, 8] * 3  # one run that is not counted, and two
    assert found["batch"] == 2
    assert found["decode"]["tokens"] == 2
    assert len(found["prefill"]["seconds"]) == 2
    assert min(found["prefill"]["seconds"] + found["decode"]["seconds"]) > 0
