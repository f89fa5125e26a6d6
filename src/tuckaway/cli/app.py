"""The list of commands. What a command does is imported when it runs, so that ``--help`` answers at once.

To add one: a module of this package with a function ``command`` (see ``options.py``), and its line in ``COMMANDS``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated

import typer

import tuckaway
from tuckaway.cli import bench, demo, doctor, plan, quantize, run

__all__ = ["COMMANDS", "app"]

COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan.command,
    "run": run.command,
    "quantize": quantize.command,
    "bench": bench.command,
    "demo": demo.command,
    "doctor": doctor.command,
}
"""Every command, in the order of ``--help``."""

app = typer.Typer(
    name="tuckaway",
    help="Load and run PyTorch models that are bigger than the memory they must run in.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tuckaway {tuckaway.__version__}")
        raise typer.Exit


@app.callback()
def _tuckaway(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show tuckaway's log on standard error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if verbose:
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("tuckaway").setLevel(logging.INFO)


for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
