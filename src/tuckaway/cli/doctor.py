"""``tuckaway doctor``: what a machine has, how fast it is, and what slows it down."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Annotated, Any

import typer

from tuckaway.cli.checks import Facts, findings, gather
from tuckaway.cli.machine import conditions
from tuckaway.cli.options import JsonOption
from tuckaway.cli.show import Screen
from tuckaway.plan import Speeds, format_bytes, known_speeds, remember_speeds
from tuckaway.plan.measure import measure_speeds

__all__ = ["command"]

_SPEEDS = (
    ("bus", "pinned RAM to the GPU"),
    ("memory", "the GPU's memory"),
    ("host", "RAM, all cores"),
    ("page_cache", "files in the page cache"),
    ("disk", "files on disk"),
)


def command(
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure speeds, which takes seconds, and remember them for plans."),
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Folder on the disk to measure. Left out: the one of tuckaway's cache."
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Say what this machine has, what is slow about it and why, and what would help."""
    screen = Screen(json=json)
    speeds = known_speeds()
    kept: Path | None = None
    if measure:
        screen.line("measuring ...")
        speeds = measure_speeds(folder)
        kept = remember_speeds(speeds)
    facts, about = gather(speeds), conditions()
    driver = _driver()
    _show(screen, facts, about, driver, speeds, kept)
    found = findings(facts)
    screen.line()
    if found:
        rows = [(finding.what, finding.cost, finding.do) for finding in found]
        screen.table("What slows this machine down", ("found", "costs", "do"), rows, right=3)
    else:
        screen.line("nothing slows this machine down")
    screen.result(
        {
            **about,
            "driver": driver,
            "facts": dataclasses.asdict(facts),
            "findings": [dataclasses.asdict(finding) for finding in found],
        }
    )


def _show(
    screen: Screen,
    facts: Facts,
    about: dict[str, Any],
    driver: str | None,
    speeds: Speeds | None,
    kept: Path | None,
) -> None:
    devices = ", ".join(
        f"{device['name']} ({format_bytes(device['free_bytes'])} free of {format_bytes(device['total_bytes'])})"
        for device in facts.accelerators
    )
    rows = [
        ("system", about["system"]),
        ("GPU", devices or ("one that torch cannot use" if facts.gpu_present else "none")),
        ("driver", driver or "none"),
        ("torch", f"{about['versions']['torch']}, built for {facts.torch_build}"),
        ("Triton", about["versions"].get("triton", "not installed")),
        ("cores", f"{facts.threads} of {facts.cores} used by torch"),
        ("RAM", f"{format_bytes(facts.ram_free_bytes)} free of {format_bytes(facts.ram_bytes)}"),
        ("locked memory", "unlimited" if facts.locked_bytes is None else format_bytes(facts.locked_bytes)),
        ("disk of the cache", f"{format_bytes(facts.disk_free_bytes)} free"),
        *((name, found) for name, found in about["versions"].items() if name not in ("torch", "triton")),
    ]
    screen.table("This machine", ("what", "is"), rows, right=2)
    if speeds is None:
        return
    rates = [
        (text, f"{rate / 1e9:.2f} GB/s")
        for name, text in _SPEEDS
        if (rate := getattr(speeds, name)) is not None
    ]
    screen.line()
    screen.table("Speeds" + ("" if kept is None else f", kept in {kept}"), ("of", "measured"), rates)


def _driver() -> str | None:
    """Return the version of NVIDIA's driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):  # another maker's GPU, or none
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None
