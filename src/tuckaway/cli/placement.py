"""Where a loaded model lies, what it takes and how fast it answers: as tables, and as data for ``--json``."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

import tuckaway
from tuckaway.cli.answer import Answer
from tuckaway.cli.model import Built, Loaded
from tuckaway.cli.show import Screen, name_runs
from tuckaway.plan import format_bytes

__all__ = ["placement", "show_memory", "show_placement", "show_speed"]


def placement(network: Any) -> dict[str, Any]:
    """Return bytes by device and by format, for ``--json``."""
    report = network.quantization_report
    return {
        "weights_bytes": tuckaway.memory_footprint(network),
        "bytes_by_device": {str(place): nbytes for place, nbytes in report.bytes_by_device().items()},
        "bytes_by_format": report.bytes_by_format(),
    }


def show_placement(screen: Screen, network: Any) -> None:
    """Show which modules lie where."""
    modules: defaultdict[int | str, list[str]] = defaultdict(list)
    for name, place in network.hf_device_map.items():
        modules[place].append(name or "everything")
    gpu = torch.accelerator.is_available()
    meaning = {
        "cpu": "RAM, paged to the GPU for its turn" if gpu else "RAM, resident",
        "disk": f"disk, paged to {'the GPU' if gpu else 'RAM'} for its turn",
    }
    rows = [
        (
            str(place),
            meaning.get(str(place), "GPU, resident"),
            name_runs(modules[place]),
            format_bytes(nbytes),
        )
        for place, nbytes in network.quantization_report.bytes_by_device().items()
    ]
    screen.line()
    screen.table("Where everything went", ("on", "which is", "modules", "size"), rows)


def show_memory(screen: Screen, built: Built, loaded: Loaded) -> None:
    """Show what the weights take, and what the process does."""
    formats = loaded.network.quantization_report.bytes_by_format().items()
    rows = [
        ("weights in fp32", format_bytes(4 * built.parameters)),
        ("weights now: " + ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in formats),
         format_bytes(tuckaway.memory_footprint(loaded.network))),
        ("private memory of this process before loading", format_bytes(loaded.before.process_bytes)),
        ("private memory of this process after loading", format_bytes(loaded.after.process_bytes)),
    ]  # fmt: skip
    if torch.accelerator.is_available():
        rows.append(("GPU memory before loading", format_bytes(loaded.before.device_bytes)))
        rows.append(("GPU memory after loading", format_bytes(loaded.after.device_bytes)))
    screen.line()
    screen.table(f"Memory; read, quantized and placed in {loaded.seconds:.1f} s", ("what", "size"), rows)


def show_speed(screen: Screen, given: Answer) -> None:
    """Show how fast an answer came, if it was long enough to say."""
    if given.first_seconds is not None and given.tokens_per_second is not None:
        screen.line(
            f"{given.tokens} tokens, {given.tokens_per_second:.1f} tokens/s "
            f"(the first, with the prompt, after {given.first_seconds:.2f} s)"
        )
