"""What several commands ask for, written once: annotated types for the parameters of their functions.

A command is a module of this package with a function ``command``: its docstring is the help, its parameters are the
options. ``app.py`` lists the commands. A parameter that has a type here takes it:

    def command(model: ModelArgument, max_memory: MaxMemoryOption = None, json: JsonOption = False) -> None:
        screen = Screen(json=json)

What cannot be parsed is a usage error (status 2), what goes wrong later a :class:`~tuckaway.TuckawayError` (status 1).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tuckaway.config import as_dtype
from tuckaway.errors import ConfigError, TuckawayError
from tuckaway.plan import parse_bytes

__all__ = [
    "BatchOption",
    "DTypeOption",
    "DeviceMap",
    "DeviceMapOption",
    "Format",
    "FormatOption",
    "FormatsOption",
    "JsonOption",
    "MaxMemory",
    "MaxMemoryOption",
    "MaxNewTokensOption",
    "ModelArgument",
    "OffloadFolderOption",
    "OwnFormatOption",
    "RevisionOption",
    "Size",
    "parse_device_map",
    "parse_max_memory",
    "usage",
]

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential", "cpu")
"""Names that stand for a whole device map."""


class Format(StrEnum):
    """What weights are quantized to; ``none`` leaves them as they are."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"
    none = "none"


class MaxMemory(dict[int | str, int | str]):
    """Bytes by device, as ``max_memory`` of the Python functions takes them."""


@dataclass(frozen=True)
class DeviceMap:
    """A device map as the Python functions take it.

    Args:
        value: a strategy's name, or places by module.
    """

    value: str | dict[str, int | str]


@dataclass(frozen=True)
class Size:
    """A number of bytes, written as ``5GB`` or ``500MiB``. No ``int``: typer would parse one its own way."""

    nbytes: int


def parse_max_memory(text: str) -> MaxMemory:
    """Read memory by device as the command line has it.

    Raises:
        ConfigError: it is no list of ``DEVICE=SIZE``.
        PlanError: a size that is none.

    Example:
        >>> parse_max_memory("0=100MB,cpu=1.5GiB")
        {0: 100000000, 'cpu': 1610612736}
    """
    result = MaxMemory()
    for item in text.split(","):
        device, _, size = item.strip().partition("=")
        if not (device.isdigit() or device in ("cpu", "disk", "mps")) or not size:
            raise ConfigError(
                f"{item.strip()!r} is no DEVICE=SIZE", hint="write --max-memory 0=100MB,cpu=40MB"
            )
        result[int(device) if device.isdigit() else device] = parse_bytes(size)
    return result


def parse_device_map(text: str) -> DeviceMap:
    """Read a device map as the command line has it: a strategy, pairs, a JSON object, or a file that holds one.

    Raises:
        ConfigError: it is none of these.

    Example:
        >>> parse_device_map("model.embed_tokens=0,model.layers=cpu").value
        {'model.embed_tokens': 0, 'model.layers': 'cpu'}
    """
    if text in STRATEGIES:
        return DeviceMap(text)
    if text == "disk":
        return DeviceMap({"": "disk"})
    if "=" in text and not text.lstrip().startswith("{"):
        pairs = (item.strip().rpartition("=") for item in text.split(","))
        return DeviceMap({name: _place(place) for name, _, place in pairs})
    try:
        written = text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8")
        value = json.loads(written)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{text!r} is no device map: {error}",
            hint=f"write one of {', '.join(STRATEGIES)}, MODULE=PLACE pairs, or the path of a JSON file",
        ) from error
    if not isinstance(value, dict) or not all(isinstance(place, int | str) for place in value.values()):
        raise ConfigError("a device map is a JSON object of places by module", where=text)
    return DeviceMap({name: _place(str(place)) for name, place in value.items()})


def _place(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def usage(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return ``parse`` with its errors as usage errors, which name the option and end with status 2."""

    def parsed(text: Any) -> Any:
        try:
            return parse(text) if isinstance(text, str) else text  # typer parses defaults too
        except TuckawayError as error:
            raise typer.BadParameter(str(error)) from error

    return parsed


ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder with config.json and weights, or an id on the Hub."),
]
_QUANTIZED = "What the weights are quantized to."
FormatOption = Annotated[Format, typer.Option("--format", help=_QUANTIZED)]
OwnFormatOption = Annotated[
    Format | None, typer.Option("--format", help=f"{_QUANTIZED} Left out: as the checkpoint is, or nf4.")
]
FormatsOption = Annotated[
    list[Format],
    typer.Option("--format", help=f"{_QUANTIZED} Several: each is measured in a process of its own."),
]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer, at most.")
]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Sequences at once.")]
DTypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        parser=usage(lambda text: str(as_dtype(text, "--dtype")).removeprefix("torch.")),
        metavar="DTYPE",
        help="What products are computed in: bf16, fp16 or fp32. Left out: bf16 on a GPU, fp32 on a CPU.",
    ),
]
DeviceMapOption = Annotated[
    DeviceMap | None,
    typer.Option(
        "--device-map",
        parser=usage(parse_device_map),
        metavar="MAP",
        help="auto (the default), balanced, balanced_low_0, sequential, cpu, disk; "
        "pairs 'model.embed_tokens=0,model.layers=cpu'; or a JSON file of places by module.",
    ),
]
MaxMemoryOption = Annotated[
    MaxMemory | None,
    typer.Option(
        "--max-memory",
        parser=usage(parse_max_memory),
        metavar="SIZES",
        help="Memory that weights may take, by device: '0=10GB,cpu=20GB'. What does not fit goes to disk. "
        "Left out, what is free.",
    ),
]
OffloadFolderOption = Annotated[
    Path | None,
    typer.Option(
        "--offload-folder",
        file_okay=False,
        help="Folder for what goes to disk; kept, and used again the next time. Left out, a temporary one.",
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a model on the Hub.")
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on standard output, and nothing else there."),
]
