"""Let a language model answer, and show the answer while it comes.

``generate`` of transformers does the work: how a model takes its cache changes from release to release (5.24 renamed
the argument), and its own loop follows.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tuckaway.cli.show import Screen

__all__ = ["Answer", "answer", "encode"]


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

    def answer(self, begin: float, prompt_tokens: int) -> Answer:
        """Return what came since ``begin``, a time of ``perf_counter``."""
        times = self.times
        rate = (len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else None
        first = times[0] - begin if times else None
        return Answer(self._text, prompt_tokens, len(self.tokens), first, rate)


def encode(tokenizer: Any, prompt: str) -> torch.Tensor:
    """Return the tokens of a prompt, int64 ``[1, T]``, in the tokenizer's chat template where it has one."""
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]  # type: ignore[no-any-return]
    messages = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded["input_ids"]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Answer:
    """What a model said, and how fast.

    Args:
        text: the answer, without special tokens.
        prompt_tokens: tokens of the prompt.
        tokens: tokens of the answer.
        first_seconds: from the call to the first token, the prompt's work included; ``None`` if none came.
        tokens_per_second: of the tokens after the second, which a first call's preparations do not slow; ``None`` if
            there are fewer than three.
    """

    text: str
    prompt_tokens: int
    tokens: int
    first_seconds: float | None
    tokens_per_second: float | None

    def as_json(self) -> dict[str, Any]:
        """Return it as a mapping that JSON can hold."""
        return asdict(self)


def answer(screen: Screen, model: Any, tokenizer: Any, prompt: str, limit: int) -> Answer:
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
    given = shown.answer(begin, tokens.shape[-1])
    if given.first_seconds is not None and given.tokens_per_second is not None:
        screen.line(
            f"{given.tokens} tokens, {given.tokens_per_second:.1f} tokens/s "
            f"(the first, with the prompt, after {given.first_seconds:.2f} s)"
        )
    return given
