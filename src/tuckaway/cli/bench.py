"""``tuckaway bench``: what a model costs here: seconds to load, memory, tokens per second, perplexity."""

from __future__ import annotations

import json as json_
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tuckaway.checkpoint import Checkpoint
from tuckaway.cli.machine import conditions
from tuckaway.cli.measure import perplexity, speed
from tuckaway.cli.memory import peak_device_bytes, peak_process_bytes
from tuckaway.cli.model import build, load, quantization_config, tokenizer_of
from tuckaway.cli.options import (
    BatchOption,
    DeviceMapOption,
    DTypeOption,
    Format,
    FormatsOption,
    JsonOption,
    MaxMemoryOption,
    ModelArgument,
    OffloadFolderOption,
    RevisionOption,
)
from tuckaway.cli.page_cache import cached_share, evict
from tuckaway.cli.placement import placement
from tuckaway.cli.show import Screen
from tuckaway.errors import TuckawayError
from tuckaway.plan import format_bytes

__all__ = ["command"]


def command(
    model: ModelArgument,
    format: FormatsOption = [Format.nf4],  # noqa: B006  (typer copies it)
    dtype: DTypeOption = None,
    device_map: DeviceMapOption = None,
    max_memory: MaxMemoryOption = None,
    offload_folder: OffloadFolderOption = None,
    revision: RevisionOption = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated.")] = 32,
    batch: BatchOption = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Measured runs, after one that is not counted.")] = 3,
    text: Annotated[
        Path | None,
        typer.Option(
            "--perplexity", exists=True, dir_okay=False, help="A text file to measure the perplexity on."
        ),
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=2, help="Tokens of that text, at most.")] = 20480,
    cold: Annotated[
        bool, typer.Option("--cold", help="Drop the checkpoint from the page cache first.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Measure how fast a language model loads and answers here, and the memory it takes.

    Prompts are random tokens, so no tokenizer is needed but for --perplexity. The median of the runs is shown; --json
    has all of them, with the device and the versions.
    """
    screen = Screen(json=json)
    if len(format) > 1:
        results = [_in_a_process(choice.value) for choice in format]
    else:
        built = build(model, revision=revision)
        config = quantization_config(built, format[0].value, dtype)
        checkpoint = Checkpoint.open(built.source, revision=revision)
        if cold:
            evict(checkpoint.files)
        cached = cached_share(checkpoint.files)
        tokenizer = None if text is None else tokenizer_of(built)
        with load(
            built,
            config,
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
            dtype=dtype,
        ) as loaded:
            network = loaded.network
            result: dict[str, Any] = {
                "model": built.name,
                "parameters": built.parameters,
                "format": format[0].value,
                "load": {
                    "seconds": loaded.seconds,
                    "checkpoint_bytes": checkpoint.nbytes,
                    "cached_share": cached,
                },
                **placement(network),
                **speed(
                    network, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch, repeat=repeat
                ),
            }
            result["process_peak_bytes"] = peak_process_bytes()
            result["device_peak_bytes"] = peak_device_bytes()
            if text is not None:
                result["perplexity"] = perplexity(network, tokenizer, text, text_tokens)
        results = [result]
    _show(screen, results)
    screen.result(
        results[0] | {"conditions": conditions()}
        if len(results) == 1
        else {"results": results, "conditions": conditions()}
    )


def _in_a_process(format: str) -> dict[str, Any]:
    """Measure one format as the command line at hand would, in a process of its own: peaks do not mix."""
    arguments = _without_formats(sys.argv[1:])
    done = subprocess.run(
        [sys.executable, "-m", "tuckaway.cli.main", *arguments, "--format", format, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise TuckawayError(f"measuring {format} ended with status {done.returncode}")
    return json_.loads(done.stdout)  # type: ignore[no-any-return]


def _without_formats(arguments: list[str]) -> list[str]:
    """Return the arguments without ``--format X``, ``--format=X`` and ``--json``.

    >>> _without_formats(["bench", "m", "--format", "nf4", "--format=int8", "--json", "--batch", "2"])
    ['bench', 'm', '--batch', '2']
    """
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--format":
            skip = True
        elif argument != "--json" and not argument.startswith("--format="):
            kept.append(argument)
    return kept


def _show(screen: Screen, results: list[dict[str, Any]]) -> None:
    here = conditions()
    versions = here["versions"]
    first = results[0]
    screen.line(f"{first['model']}: {first['parameters'] / 1e6:,.1f} million parameters", style="bold")
    screen.line(
        f"{here['device']}, {here['threads']} threads, torch {versions['torch']}, tuckaway {versions['tuckaway']}"
    )
    rows = [[name, *(cell(result) for result in results)] for name, cell in _ROWS if cell(results[0])]
    screen.table("", ["", *(result["format"] for result in results)], rows)


def _load(result: dict[str, Any]) -> str:
    cached = result["load"]["cached_share"]
    where = "" if cached is None else f", {cached:.0%} in the page cache"
    return f"{result['load']['seconds']:.2f} s{where}"


_ROWS = [
    ("weights", lambda r: format_bytes(r["weights_bytes"])),
    ("loading", _load),
    ("this process, at most", lambda r: format_bytes(r["process_peak_bytes"])),
    (
        "tensors on the GPU, at most",
        lambda r: format_bytes(r["device_peak_bytes"]) if r["device_peak_bytes"] else "",
    ),
    ("prompt", lambda r: f"{r['prefill']['tokens_per_second']:.1f} tokens/s"),
    ("answer", lambda r: f"{r['decode']['tokens_per_second']:.1f} tokens/s"),
    ("the first call", lambda r: f"{r['first_call_seconds']:.2f} s"),
    ("perplexity", lambda r: f"{r['perplexity']['value']:.3f}" if "perplexity" in r else ""),
]
