"""``tuckaway run``: a model quantized and placed as asked, and a conversation with it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer

import tuckaway
from tuckaway.cli.answer import Answer, Message, Sampling, answer
from tuckaway.cli.kept_cache import KeptCache
from tuckaway.cli.memory import peak_device_bytes, peak_process_bytes
from tuckaway.cli.model import Built, Loaded, build, load, quantization_config, tokenizer_of
from tuckaway.cli.options import (
    DeviceMapOption,
    DTypeOption,
    JsonOption,
    MaxMemoryOption,
    MaxNewTokensOption,
    ModelArgument,
    OffloadFolderOption,
    OwnFormatOption,
    RevisionOption,
)
from tuckaway.cli.placement import placement, show_placement, show_speed
from tuckaway.cli.show import Screen
from tuckaway.plan import format_bytes

__all__ = ["Conversation", "chat", "command"]

_HELP = "/new forgets the conversation, /exit or Ctrl-D ends it; Ctrl-C stops an answer"


def command(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What the model is asked. Left out: standard input; in a terminal, a conversation."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before.")] = None,
    format: OwnFormatOption = None,
    dtype: DTypeOption = None,
    device_map: DeviceMapOption = None,
    max_memory: MaxMemoryOption = None,
    offload_folder: OffloadFolderOption = None,
    revision: RevisionOption = None,
    max_new_tokens: MaxNewTokensOption = 512,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; 0.7 varies as chats often do.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of sampled tokens: the likeliest that make this much.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampled answers repeatable.")] = None,
    json: JsonOption = False,
) -> None:
    """Load a language model, quantized and placed over GPU, RAM and disk, and talk to it."""
    talking = prompt is None and sys.stdin.isatty()
    if talking and json:
        raise typer.BadParameter("a conversation has no single result: give --prompt", param_hint="--json")
    if prompt is None and not talking:
        prompt = sys.stdin.read().strip()
    screen = Screen(json=json)
    built = build(model, revision=revision)
    tokenizer = tokenizer_of(built)
    config = quantization_config(built, None if format is None else format.value, dtype)
    with load(
        built,
        config,
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=offload_folder,
        dtype=dtype,
    ) as loaded:
        _show_loaded(screen, built, loaded)
        conversation = Conversation(
            screen, loaded.network, tokenizer, max_new_tokens, Sampling(temperature, top_p, seed), system
        )
        if talking:
            chat(conversation)
        else:
            conversation.ask(prompt or "")
        _show_end(screen, conversation.answers)
        if json:
            screen.result(_result(built, loaded, conversation.answers[-1]))


@dataclass
class Conversation:
    """Messages to and from a model.

    Args:
        screen: where answers are shown.
        network: a causal language model of transformers.
        tokenizer: its tokenizer; without a chat template every question stands alone.
        limit: tokens of an answer, at most.
        sampling: how tokens are chosen.
        system: what the model is told before.
    """

    screen: Screen
    network: Any
    tokenizer: Any
    limit: int
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    cache: KeptCache = field(default_factory=KeptCache)

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.cache = KeptCache()
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, prompt: str) -> Answer:
        """Show the answer to a prompt, and keep both."""
        self.messages.append({"role": "user", "content": prompt})
        given = answer(
            self.screen, self.network, self.tokenizer, self.messages, self.limit, self.sampling, self.cache
        )
        self.messages.append({"role": "assistant", "content": given.text})
        self.answers.append(given)
        return given


def chat(conversation: Conversation, read: Callable[[str], str] = input) -> None:
    """Ask what is typed, until Ctrl-D or ``/exit``.

    Args:
        conversation: with whom.
        read: shows a prompt and returns a line, as ``input`` does.
    """
    screen = conversation.screen
    screen.line(_HELP, style="dim")
    if not conversation.tokenizer.chat_template:
        screen.line("the model has no chat template: every line is continued by itself", style="dim")
    while True:
        try:
            text = read("\n> ").strip()
        except EOFError:
            screen.line()
            return
        except KeyboardInterrupt:  # a line begun by mistake
            continue
        if text in ("/exit", "/quit"):
            return
        if text == "/new":
            conversation.forget()
        elif text.startswith("/"):
            screen.line(_HELP, style="dim")
        elif text:
            given = conversation.ask(text)
            if given.stopped:
                screen.line("(stopped)", style="dim")


def _show_loaded(screen: Screen, built: Built, loaded: Loaded) -> None:
    formats = loaded.network.quantization_report.bytes_by_format().items()
    parts = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in formats)
    screen.line(
        f"{built.name}: {built.parameters / 1e6:,.1f} million parameters in "
        f"{format_bytes(tuckaway.memory_footprint(loaded.network))} ({parts}), "
        f"loaded in {loaded.seconds:.1f} s",
        style="bold",
    )
    if len(set(loaded.network.hf_device_map.values())) > 1:
        show_placement(screen, loaded.network)
    screen.line()


def _show_end(screen: Screen, answers: list[Answer]) -> None:
    screen.line()
    if len(answers) == 1:
        show_speed(screen, answers[0])
    elif rates := [a.tokens_per_second for a in answers if a.tokens_per_second is not None]:
        total = sum(a.tokens for a in answers)
        screen.line(f"{len(answers)} answers, {total} tokens, {min(rates):.1f} to {max(rates):.1f} tokens/s")
    text = f"memory: this process {format_bytes(peak_process_bytes())} at most"
    if torch.accelerator.is_available():
        text += f", tensors on the GPU {format_bytes(peak_device_bytes())} at most"
    screen.line(text)


def _result(built: Built, loaded: Loaded, given: Answer) -> dict[str, Any]:
    return {
        "model": built.name,
        "parameters": built.parameters,
        "load_seconds": loaded.seconds,
        "device_map": {name: str(place) for name, place in loaded.network.hf_device_map.items()},
        **placement(loaded.network),
        "process_peak_bytes": peak_process_bytes(),
        "device_peak_bytes": peak_device_bytes(),
        **given.as_json(),
    }
