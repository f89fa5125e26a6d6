"""``tuckaway demo``: a real language model, quantized, spread over all memory there is, answering a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
import typer
from torch import nn

from tuckaway.cli.answer import answer
from tuckaway.cli.model import build, load, quantization_config, tokenizer_of
from tuckaway.cli.options import Format, FormatOption, JsonOption, MaxMemoryOption, MaxNewTokensOption
from tuckaway.cli.placement import placement, show_memory, show_placement, show_speed
from tuckaway.cli.show import Screen
from tuckaway.cli.smollm2 import REPOSITORY, smollm2
from tuckaway.plan import account, choose_specs
from tuckaway.tensor import TensorSpec

__all__ = ["command", "default_budget", "run_demo"]

_RESIDENT_SHARE = 0.4
"""Part of the blocks that the default budget leaves room for on the executing device."""
_RAM_SHARE = 0.3
"""The same for RAM, where a GPU executes; the rest goes to disk."""


def command(
    format: FormatOption = Format.nf4,
    max_memory: MaxMemoryOption = None,
    prompt: Annotated[str, typer.Option(help="What the model is asked.")] = "Why is the sky blue?",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="HUB_ID_OR_PATH",
            help="A causal language model on the Hugging Face Hub or in a folder. Left out, SmolLM2-135M-Instruct.",
        ),
    ] = None,
    max_new_tokens: MaxNewTokensOption = 64,
    json: JsonOption = False,
) -> None:
    """Quantize a real language model, spread it over GPU, RAM and disk, and let it answer.

    Without --max-memory, the budget is so small that every kind of placement is in use.
    """
    run_demo(
        format=format.value,
        max_memory=max_memory,
        prompt=prompt,
        model=model,
        max_new_tokens=max_new_tokens,
        screen=Screen(json=json),
    )


def run_demo(
    *,
    format: str,
    max_memory: Mapping[int | str, int | str] | None,
    prompt: str,
    model: str | None,
    max_new_tokens: int,
    screen: Screen,
) -> None:
    """Load a model as small as asked, show where it lies, and print its answer token by token.

    Args:
        format: ``"nf4"``, ``"fp4"``, ``"int8"`` or ``"none"``.
        max_memory: bytes by device; ``None``: :func:`default_budget`.
        prompt: what the model is asked, through its chat template where it has one.
        model: Hub id or folder of a causal language model; ``None``: SmolLM2-135M-Instruct.
        max_new_tokens: tokens of the answer, at most.
        screen: where to print.

    Raises:
        TuckawayError: the model cannot be had, or does not fit.
    """
    source = model if model is not None else str(smollm2())
    built = build(model or REPOSITORY, source=source)
    tokenizer = tokenizer_of(built)
    config = quantization_config(built, format)
    screen.line(f"{built.name}: {built.parameters / 1e6:,.1f} million parameters, built empty", style="bold")
    screen.line(f"weights from {source}")
    if max_memory is None:
        specs, _ = choose_specs(built.network, config)
        available = torch.accelerator.is_available()
        max_memory = default_budget(built.network, specs, built.blocks, accelerator=available)

    with load(built, config, max_memory=max_memory) as loaded:
        show_placement(screen, loaded.network)
        show_memory(screen, built, loaded)
        screen.line()
        screen.line(f"> {prompt}", style="bold")
        messages = [{"role": "user", "content": prompt}]
        given = answer(screen, loaded.network, tokenizer, messages, max_new_tokens)
        screen.line()
        show_speed(screen, given)
        screen.result(
            {
                "model": built.name,
                "parameters": built.parameters,
                "format": format,
                "load_seconds": loaded.seconds,
                "device_map": dict(loaded.network.hf_device_map),
                **placement(loaded.network),
                **given.as_json(),
            }
        )


def default_budget(
    model: nn.Module, specs: Mapping[str, TensorSpec], blocks: Sequence[str], *, accelerator: bool
) -> dict[int | str, int | str]:
    """Return a ``max_memory`` under which every kind of placement is in use.

    The executing device has room for what is no block (the embedding, mostly) and two fifths of the blocks; under a
    GPU, RAM has room for three tenths. The rest goes to disk.

    Args:
        model: its structure.
        specs: final form of every tensor.
        blocks: names of the modules that may not be split.
        accelerator: whether a GPU executes.
    """
    main: int | str = 0 if accelerator else "cpu"
    resident = math.floor(_RESIDENT_SHARE * len(blocks))
    in_ram = math.floor(_RAM_SHARE * len(blocks)) if accelerator else 0
    places = [main] * resident + ["cpu"] * in_ram
    device_map = {"": main, **dict.fromkeys(blocks, "disk"), **dict(zip(blocks, places, strict=False))}
    whole = sorted({type(model.get_submodule(name)).__name__ for name in blocks})
    return {**account(model, specs, device_map, main=main, no_split_module_classes=whole).least_memory}
