"""Speed and perplexity of a loaded language model."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from tuckaway.cli.answer import Watch
from tuckaway.errors import ConfigError

__all__ = ["perplexity", "speed"]

_WINDOW = 1024
"""Tokens that perplexity is measured over at a time, or as many as the model takes."""


def speed(
    network: Any, *, prompt_tokens: int, new_tokens: int, batch: int = 1, repeat: int = 3
) -> dict[str, Any]:
    """Time ``generate`` on random prompts.

    Args:
        network: a causal language model of transformers.
        prompt_tokens: T of the prompts, int64 ``[B, T]``.
        new_tokens: tokens generated, no more and no fewer.
        batch: B.
        repeat: measured runs; one comes before them, which compiles what there is to compile.

    Returns:
        Seconds of the first call; of prompts (to the first token) and of the tokens after it every run's seconds, and
        tokens per second, of all sequences together, in the median run.
    """
    shape = (batch, prompt_tokens)
    vocabulary = network.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(_device())
    prefill, decode = [], []
    first_call = math.nan
    for turn in range(repeat + 1):
        watch, begin = Watch(), time.perf_counter()
        network.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
            stopping_criteria=[watch],
        )
        if turn == 0:
            first_call = watch.times[-1] - begin
            continue
        prefill.append(watch.times[0] - begin)
        decode.append(watch.times[-1] - watch.times[0])
    return {
        "batch": batch,
        "first_call_seconds": first_call,
        "prefill": _summary(prompt_tokens, batch, prefill),
        "decode": _summary(new_tokens - 1, batch, decode),
    }


@torch.no_grad()
def perplexity(network: Any, tokenizer: Any, text: Path, limit: int) -> dict[str, Any]:
    """Return exp of the mean cross-entropy over windows of a text, each predicted from its own beginning.

    Args:
        network: a causal language model of transformers.
        tokenizer: its tokenizer.
        text: UTF-8.
        limit: tokens at most.

    Raises:
        ConfigError: the text has fewer than two tokens.
    """
    ids = tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"][:limit]
    window = min(_WINDOW, getattr(network.config, "max_position_embeddings", None) or _WINDOW)
    total, count = 0.0, 0
    for piece in torch.tensor(ids, dtype=torch.int64).split(window):
        if len(piece) < 2:
            continue
        here = piece.to(_device())
        logits = network(input_ids=here[None], use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, here[1:].to(logits.device), reduction="sum")
        total, count = total + loss.item(), count + len(piece) - 1
    if not count:
        raise ConfigError("the text has fewer than two tokens", where=text)
    return {"value": math.exp(total / count), "tokens": len(ids), "window": window}


def _summary(tokens: int, batch: int, seconds: list[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": batch * tokens / median}


def _device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")
