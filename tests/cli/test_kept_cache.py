"""Tokens that come with a kept cache are those that come without; what cannot be added to is not kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tuckaway.cli.kept_cache import KeptCache
from zoo.harness import with_weights
from zoo.language_models import LANGUAGE


def generate(model: Any, tokens: torch.Tensor, cache: KeptCache) -> tuple[torch.Tensor, int]:
    kept, spared = cache.take(tokens)
    output = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=9,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        **kept,
    )
    cache.keep(output)
    return output.sequences, spared


def built(name: str, **options: Any) -> Any:
    entry = next(entry for entry in LANGUAGE if entry.name == name)
    config = entry.make_config()
    for key, value in options.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    import transformers

    return with_weights(lambda: getattr(transformers, entry.model)(config).eval())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "options"),
    [("Llama", {}), ("Mistral", {"sliding_window": 8}), ("Gemma2", {"sliding_window": 8})],
)
def test_same_tokens(name: str, options: dict[str, Any]) -> None:
    model, cache = built(name, **options), KeptCache()
    tokens = torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(1))
    for turn in range(3):
        found, spared = generate(model, tokens, cache)
        expected, _ = generate(model, tokens, KeptCache())
        assert torch.equal(found, expected)
        assert spared == (tokens.shape[1] - 6 if turn else 0)
        tokens = torch.cat([found, torch.randint(3, 100, (1, 5))], 1)


def test_another_prefix_and_a_failure_in_between() -> None:
    model, cache = built("Llama"), KeptCache()
    tokens = torch.arange(5, 15)[None]
    found, _ = generate(model, tokens, cache)
    other = found.clone()
    other[0, 3] += 1
    assert generate(model, torch.cat([other, tokens], 1), cache)[1] == 0
    found, _ = generate(model, tokens, cache)
    cache.take(torch.cat([found, tokens], 1))  # and the generation fails
    assert cache.take(torch.cat([found, tokens], 1)) == ({}, 0)
    generate(model, tokens, cache)
    assert generate(model, tokens, cache)[1] == 0  # nothing new: the last token must be computed with


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Mamba", "Qwen3Next"])
def test_recurrent_states_are_not_kept(name: str) -> None:
    model, cache = built(name), KeptCache()
    found, _ = generate(model, torch.arange(5, 15)[None], cache)
    assert cache.take(torch.cat([found, found], 1)) == ({}, 0)
