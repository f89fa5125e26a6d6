"""The directive ``commands``: every command of ``tuckaway`` with its options, from the functions themselves."""

from __future__ import annotations

import enum
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Commands(SphinxDirective):
    """One section a command: what it does, its arguments and options with their defaults."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        from tuckaway.cli.app import COMMANDS

        lines = [line for name, command in COMMANDS.items() for line in described(name, command)]
        holder = nodes.section()
        holder.document = self.state.document
        self.state.nested_parse(StringList(lines, source="commands"), 0, holder, match_titles=True)
        return holder.children


def described(name: str, command: Callable[..., None]) -> Iterator[str]:
    """Yield a command's section as lines of Markdown."""
    arguments = " ".join(row[0] for row in rows(command) if not row[0].startswith("`-"))
    yield from ("", f"## `tuckaway {name}`", "")
    yield from inspect.getdoc(command).splitlines()  # type: ignore[union-attr]
    yield from (
        "",
        "```text",
        f"tuckaway {name} {arguments.replace('`', '')} [OPTIONS]".replace("  ", " "),
        "```",
    )
    yield from ("", "| | | default |", "| --- | --- | --- |")
    for row in rows(command):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


def rows(command: Callable[..., None]) -> Iterator[tuple[str, str, str]]:
    """Yield name, help and default of each parameter, as Markdown."""
    hints = typing.get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        kind, info = typing.get_args(hints[parameter.name])[:2]
        kinds = [part for part in flat(kind) if part is not type(None)]
        if type(info).__name__ == "ArgumentInfo":
            name = info.metavar or parameter.name.upper()
        else:
            given = (
                info.default,
                *(info.param_decls or ()),
            )  # in Annotated, the first takes the default's place
            spelt = [name for name in given if isinstance(name, str) and name.startswith("-")]
            if not spelt:
                own = parameter.name.replace("_", "-")
                spelt = [f"--{own}", f"--no-{own}"] if kinds == [bool] else [f"--{own}"]
            values = "" if kinds == [bool] else " " + (info.metavar or metavar(kinds))
            name = ", ".join(spelt) + values
        yield f"`{name}`", " ".join((info.help or "").split()), default(parameter.default)


def flat(kind: Any) -> list[Any]:
    """Return the members of a union or list, or the type alone."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union, list):
        return [part for member in typing.get_args(kind) for part in flat(member)]
    return [kind]


def metavar(kinds: list[Any]) -> str:
    """Name what an option takes: its choices, or its type."""
    kind = kinds[0]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "|".join(member.value for member in kind)
    return re.sub(
        r"(?<=[a-z])(?=[A-Z])", "_", {"str": "TEXT", "int": "N"}.get(kind.__name__, kind.__name__)
    ).upper()


def default(value: Any) -> str:
    """Write a default as it would be typed; nothing for none."""
    if value is inspect.Parameter.empty:
        return "required"
    if value is None or value is False or value == []:
        return ""
    if value is True:
        return "on"
    values = value if isinstance(value, list) else [value]
    return ", ".join(f"`{item.value if isinstance(item, enum.Enum) else item}`" for item in values)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
