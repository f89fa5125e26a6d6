"""``tuckaway plan``: where everything of a model would go and what it would take, before anything is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tuckaway
from tuckaway.cli.options import (
    BatchOption,
    DeviceMapOption,
    DTypeOption,
    JsonOption,
    MaxMemoryOption,
    ModelArgument,
    RevisionOption,
    Size,
    usage,
)
from tuckaway.cli.show import Screen
from tuckaway.errors import PlanError
from tuckaway.plan import format_bytes, parse_bytes

__all__ = ["command"]


def command(
    model: ModelArgument,
    format: Annotated[
        str | None,
        typer.Option(
            help="nf4, fp4, int8, or a dtype (bf16, fp16, fp32) for no quantization. Left out: as the model's files "
            "say, or nf4."
        ),
    ] = None,
    dtype: DTypeOption = None,
    device_map: DeviceMapOption = None,
    max_memory: MaxMemoryOption = None,
    batch: BatchOption = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of prompt and answer.")] = 2048,
    reserve: Annotated[
        Size | None,
        typer.Option(
            parser=usage(lambda text: Size(parse_bytes(text))),
            metavar="SIZE",
            help="Kept free for activations and KV cache. Left out: estimated from batch and length.",
        ),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Offloaded blocks on the GPU at once.")] = 2,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit",
            help="Choose the format too: the most precise that needs no paging, else the fastest placement.",
        ),
    ] = False,
    picture: Annotated[Path | None, typer.Option(dir_okay=False, help="Draw it into an SVG file.")] = None,
    save: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write it as JSON, for Plan.load and device_map.")
    ] = None,
    revision: RevisionOption = None,
    json: JsonOption = False,
) -> None:
    """Say where a model would go and what it would take, in exact bytes, without its weights.

    Of a model on the Hub only config.json and the headers of its weights are read. The status is 1 when it does not
    fit.
    """
    screen = Screen(json=json)
    try:
        found = tuckaway.plan(
            model,
            format,
            "auto" if device_map is None else device_map.value,
            max_memory,
            dtype=dtype,
            batch_size=batch,
            sequence_length=length,
            reserve_bytes=None if reserve is None else reserve.nbytes,
            slots=slots,
            fit=fit,
            revision=revision,
        )
    except PlanError as error:
        if error.shortfall_bytes is None or not json:
            raise
        screen.result(
            {"fits": False, "shortfall_bytes": error.shortfall_bytes, "error": error.what, "hint": error.hint}
        )
        raise typer.Exit(1) from error
    if picture is not None:
        found.picture(picture)
    if save is not None:
        found.save(save)
    _show(screen, found)
    expected = found.expected
    screen.result(
        {
            "fits": True,
            "weights_bytes": found.weights_bytes,
            "paged_bytes": found.paged_bytes,
            "load_seconds": expected.load_seconds,
            "tokens_per_second": expected.tokens_per_second(batch),
            "plan": found.to_dict(),
        }
    )


def _show(screen: Screen, found: tuckaway.Plan) -> None:
    screen.line(f"{found.name}: {found.title}", style="bold")
    screen.line()
    screen.table("Blocks", *found.block_table(), right=3)
    screen.line()
    screen.table("Devices", *found.device_table(), right=1)
    screen.line()
    reserve = found.on(found.execution_device).reserve_bytes
    screen.line(
        f"reserve: {format_bytes(reserve)} for {found.batch_size} x {found.sequence_length} tokens; "
        f"{found.slots} slots of {format_bytes(found.slot_bytes)}"
    )
    for line in found.expected.lines(found.batch_size):
        screen.line(line)
    if found.speeds is None:
        screen.line("times are not known: measure this machine once with `tuckaway doctor --measure`")
