"""``tuckaway quantize``: a checkpoint of any size turned into a quantized one, without its model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

import tuckaway
from tuckaway.cli.options import DTypeOption, JsonOption, RevisionOption
from tuckaway.cli.show import Screen
from tuckaway.config import FORMATS
from tuckaway.errors import ConfigError
from tuckaway.plan import parse_bytes

__all__ = ["command"]


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A folder, a safetensors file, an index of shards or an id on the Hub."
        ),
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder of the result; must not exist, or be empty.")
    ],
    format: Annotated[
        str, typer.Option(help=f"What the weights are quantized to: {', '.join(FORMATS)}.")
    ] = "nf4",
    blocksize: Annotated[int, typer.Option(help="Weights that share one scale (4-bit formats).")] = 64,
    nested: Annotated[bool, typer.Option(help="Quantize the scales too (4-bit formats).")] = True,
    dtype: DTypeOption = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="A module that stays as it is, by name or pattern; may be repeated. Left out: the output head."
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Bytes of a shard at most, as '5GB' (the default); what a kill can cost."
        ),
    ] = None,
    low_disk: Annotated[
        bool,
        typer.Option("--low-disk", help="Drop every downloaded shard when what was made of it is verified."),
    ] = False,
    push: Annotated[str | None, typer.Option(metavar="HUB_ID", help="Upload the result to the Hub.")] = None,
    revision: RevisionOption = None,
    json: JsonOption = False,
) -> None:
    """Quantize a checkpoint shard by shard, in little memory; the same command goes on after a kill."""
    screen = Screen(json=json)
    if max_shard_size is not None:
        parse_bytes(max_shard_size)
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}", hint=f"known are {', '.join(FORMATS)}")
    config = tuckaway.QuantizationConfig(
        format=format,
        blocksize=blocksize,
        nested=nested,
        compute_dtype=dtype or "bf16",
        skip_modules=skip or None,
    )
    done = tuckaway.quantize_checkpoint(
        source,
        destination,
        config,
        max_shard_size=max_shard_size,
        low_disk=low_disk,
        push_to_hub=push,
        revision=revision,
    )
    for line in str(done).splitlines():
        screen.line(line)
    if done.address is not None:
        screen.line(f"pushed to {done.address}")
    screen.result(_result(done))


def _result(done: tuckaway.Conversion) -> dict[str, Any]:
    return {
        "destination": os.fspath(done.destination),
        "files": [path.name for path in done.files],
        "source_bytes": done.source_bytes,
        "bytes": done.nbytes,
        "kept_shards": done.kept_shards,
        "seconds": round(done.seconds, 3),
        "decided_by": done.basis,
        "quantized": len(done.report.quantized),
        "not_quantized": {row.name: row.reason for row in done.report.unquantized},
        "address": done.address,
    }
