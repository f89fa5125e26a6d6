"""Let a language model answer, and show the answer while it comes.

``generate`` of transformers does the work: how a model takes its cache changes from release to release (5.24 renamed
the argument), and its own loop follows.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from tuckaway.cli.kept_cache import KeptCache

if TYPE_CHECKING:
    from tuckaway.cli.show import Screen

__all__ = ["Answer", "Sampling", "Watch", "answer", "encode"]

Message = Mapping[str, str]
"""``{"role": "user", "content": "..."}``, as chat templates have it."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0.0 takes the likeliest; larger values vary more.
        top_p: choose among the likeliest tokens that together have this probability.
        seed: makes a sampled answer repeatable.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Return what ``generate`` takes."""
        if self.temperature == 0.0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.seed is not None:
            torch.manual_seed(self.seed)
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


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
        stopped: whether Ctrl-C ended it.
        kept_tokens: tokens of the prompt that were computed in an earlier turn, and not again.
    """

    text: str
    prompt_tokens: int
    tokens: int
    first_seconds: float | None
    tokens_per_second: float | None
    stopped: bool = False
    kept_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return it as a mapping that JSON can hold."""
        return asdict(self)


class Watch:
    """A stopping criterion of ``generate``: notes when each token is there, and ends the answer when asked to."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.stop = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Take the tokens so far, int64 ``[B, T]``; return which sequences end here, bool ``[B]``."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.times.append(time.perf_counter())
        return torch.full((input_ids.shape[0],), self.stop, dtype=torch.bool, device=input_ids.device)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let Ctrl-C end the answer after the token at hand; a second one ends the process.

        An exception in the middle of a token would leave a paged block on the way.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return

        def stop(number: int, frame: Any) -> None:
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True

        previous = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


class _Shown:
    """What ``generate`` calls a streamer: takes tokens, shows their text as soon as its characters are whole."""

    def __init__(self, screen: Screen, tokenizer: Any) -> None:
        self.screen = screen
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.text = ""
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then each token as it comes."""
        if self._prompt:
            self._prompt = False
            return
        self.tokens.extend(value.reshape(-1).tolist())
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith(
            "\N{REPLACEMENT CHARACTER}"
        ):  # else a character whose bytes are not all there yet
            self.screen.piece(text[len(self.text) :])
            self.text = text

    def end(self) -> None:
        """Nothing is held back at the end."""


def encode(tokenizer: Any, messages: Sequence[Message]) -> torch.Tensor:
    """Return the tokens of a conversation, int64 ``[1, T]``, in the tokenizer's chat template.

    Without a template, the text of the last message: a model that was not trained to chat continues what it is given.
    """
    if not tokenizer.chat_template:
        return tokenizer(messages[-1]["content"], return_tensors="pt")["input_ids"]  # type: ignore[no-any-return]
    encoded = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded["input_ids"]  # type: ignore[no-any-return]


def answer(
    screen: Screen,
    model: Any,
    tokenizer: Any,
    messages: Sequence[Message],
    limit: int,
    sampling: Sampling | None = None,
    cache: KeptCache | None = None,
) -> Answer:
    """Show what a model says next, token by token.

    Args:
        screen: where it is shown.
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        messages: the conversation so far.
        limit: tokens at most; an end-of-sequence token or Ctrl-C ends the answer earlier.
        sampling: how tokens are chosen; ``None``: the likeliest.
        cache: of the conversation, used and brought up to date; ``None``: all of it is computed.
    """
    executing = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    tokens = encode(tokenizer, messages).to(executing or "cpu")
    shown, watch, cache = _Shown(screen, tokenizer), Watch(), cache or KeptCache()
    kept, spared = cache.take(tokens)
    begin = time.perf_counter()
    with watch.interruptible():
        output = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=limit,
            pad_token_id=tokenizer.eos_token_id,
            streamer=shown,
            stopping_criteria=[watch],
            return_dict_in_generate=True,
            **kept,
            **(sampling or Sampling()).arguments(),
        )
    cache.keep(output)
    screen.line()
    times = watch.times
    return Answer(
        text=shown.text,
        prompt_tokens=tokens.shape[-1],
        tokens=len(shown.tokens),
        first_seconds=times[0] - begin if times else None,
        tokens_per_second=(len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else None,
        stopped=watch.stop,
        kept_tokens=spared,
    )
