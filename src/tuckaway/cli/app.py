"""The commands and their options. What a command does is imported when it runs, so that ``--help`` answers at once."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(
    name="tuckaway",
    help="Load and run PyTorch models that are bigger than the memory they must run in.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Format(StrEnum):
    """What weights can be quantized to."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


@app.callback()
def _tuckaway() -> None:
    """Keep ``demo`` a command of its own: an app of one command would take its place."""


@app.command()
def demo(
    format: Annotated[Format, typer.Option(help="What the weights are quantized to.")] = Format.nf4,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="Memory that weights may take, by device: '0=100MB,cpu=40MB'. What does not fit goes to disk. "
            "Left out, a budget so small that every kind of placement is in use.",
        ),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the model is asked.")] = "Why is the sky blue?",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="HUB_ID_OR_PATH",
            help="A causal language model on the Hugging Face Hub or in a folder. Left out, SmolLM2-135M-Instruct.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer, at most.")] = 64,
) -> None:
    """Quantize a real language model, spread it over GPU, RAM and disk, and let it answer."""
    from tuckaway.cli.demo import run_demo

    run_demo(
        format=format.value,
        max_memory=max_memory,
        prompt=prompt,
        model=model,
        max_new_tokens=max_new_tokens,
    )
