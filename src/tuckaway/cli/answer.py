"""Let a language model answer, and show the answer while it comes.

``generate`` of transformers does the work: how a model takes its cache changes from release to release (5.24 renamed
the argument), and its own loop follows.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tuckaway.cli.show import Screen

__all__ = ["answer", "encode"]


class _Shown:
    """What ``generate`` calls a streamer: takes tokens, shows their text as soon as its characters are whole."""

    def __init__(self, screen: Screen, tokenizer: Any) -> None:
        self.screen = screen
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._text = ""
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then each token as it comes."""
        if self._prompt:
            self._prompt = False
            return
        self.tokens.extend(value.reshape(-1).tolist())
        self.times.append(time.perf_counter())
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith(
            "\N{REPLACEMENT CHARACTER}"
        ):  # else a character whose bytes are not all there yet
            self.screen.piece(text[len(self._text) :])
            self._text = text

    def end(self) -> None:
        """Nothing is held back at the end."""


def encode(tokenizer: Any, prompt: str) -> torch.Tensor:
    """Return the tokens of a prompt, int64 ``[1, T]``, in the tokenizer's chat template where it has one."""
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]  # type: ignore[no-any-return]
    messages = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded["input_ids"]  # type: ignore[no-any-return]


def answer(screen: Screen, model: Any, tokenizer: Any, prompt: str, limit: int) -> None:
    """Show the likeliest continuation of a prompt, token by token, and how fast it came.

    Args:
        screen: where it is shown.
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        prompt: what is asked.
        limit: tokens at most; an end-of-sequence token ends the answer earlier.
    """
    executing = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    tokens = encode(tokenizer, prompt).to(executing or "cpu")
    screen.line()
    screen.line(f"> {prompt}", style="bold")
    shown = _Shown(screen, tokenizer)
    begin = time.perf_counter()
    model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=limit,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.eos_token_id,
        streamer=shown,
    )
    screen.line()
    screen.line()
    times = shown.times
    if len(times) > 2:
        rate = (len(times) - 2) / (times[-1] - times[1])
        screen.line(
            f"{len(times)} tokens, {rate:.1f} tokens/s "
            f"(the first, with the prompt, after {times[0] - begin:.2f} s)"
        )
