"""Which tensors of a model a pattern means: by exact name, glob or regular expression, never by a part of a name."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

from torch import nn

from tuckaway.errors import ConfigError, nearest_names
from tuckaway.plan.ties import ancestors

__all__ = ["ModelNames", "is_wild", "matches"]

_log = logging.getLogger("tuckaway")

_REGULAR = "re:"
_OF_ROUTER = 8
"""Parameters that a router has at most: those there are have one to four."""


def is_wild(pattern: str) -> bool:
    """Tell a glob or a regular expression from a name."""
    return pattern.startswith(_REGULAR) or any(wild in pattern for wild in "*?[")


def matches(pattern: str, path: str) -> bool:
    """Tell whether ``pattern`` means the module or tensor at ``path``.

    >>> matches("mlp.c_proj", "h.0.mlp.c_proj"), matches("proj", "h.0.mlp.c_proj")
    (True, False)
    >>> matches("h.*.mlp", "h.0.mlp"), matches(r"re:h[.][0-3][.].*", "h.4.mlp")
    (True, False)
    """
    if pattern.startswith(_REGULAR):
        return re.fullmatch(pattern[len(_REGULAR) :], path) is not None
    if is_wild(pattern):
        return fnmatchcase(path, pattern)
    return bool(pattern) and (path == pattern or path.endswith(f".{pattern}"))


class ModelNames:
    """A model's modules, parameters and buffers under each of their names, and the patterns matched against them.

    Args:
        model: any module.
        strict: a pattern that matches nothing is an error; otherwise a warning.
    """

    def __init__(self, model: nn.Module, *, strict: bool = True) -> None:
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.buffers = dict(model.named_buffers(remove_duplicate=False))
        self.strict = strict
        # parameters as well: the names in a checkpoint are what people copy
        self._paths = [*filter(None, self.modules), *self.parameters, *self.buffers]

    def owner(self, name: str) -> nn.Module:
        """Return the module that holds a tensor."""
        return self.modules[name.rpartition(".")[0]]

    def user(self, name: str) -> nn.Module:
        """Return the module that a tensor is used by: of a parametrized weight, the module that has the weight."""
        path, found, _ = name.rpartition(".parametrizations.")
        if found or name.startswith("parametrizations."):
            return self.modules[path]
        return self.owner(name)

    def in_router(self, name: str) -> bool:
        """Tell whether a tensor is part of a router: of a module that says so in its class and has few parameters.

        Not of the model itself, which may be a router of something else.
        """
        holders = (self.modules[path] for path in ancestors(name) if path and path in self.modules)
        return any(
            "Router" in type(module).__name__
            and len(list(islice(module.parameters(), _OF_ROUTER + 1))) <= _OF_ROUTER
            for module in holders
        )

    def within(self, path: str) -> Iterator[str]:
        """Yield the names of the tensors at or below ``path``."""
        for name in (*self.parameters, *self.buffers):
            if path in ancestors(name):
                yield name

    def below(self, pattern: str, parameter: str) -> Iterator[str]:
        """Yield the names of the tensors at or below whatever ``pattern`` matches.

        Args:
            pattern: a name, a glob or ``re:`` and a regular expression.
            parameter: the config's field it stands in, for messages.

        Raises:
            ConfigError: it matches nothing.
        """
        matched = self._matched(pattern, parameter)
        for name in (*self.parameters, *self.buffers):
            if not matched.isdisjoint(ancestors(name)):
                yield name

    def named_by(self, pattern: str, parameter: str) -> set[str]:
        """Return the names of parameters that ``pattern`` names without wildcards, themselves or by their module."""
        if is_wild(pattern):
            return set()
        matched = self._matched(pattern, parameter)
        return {name for name in self.parameters if name in matched or name.rpartition(".")[0] in matched}

    def choices(self, formats: Mapping[Any, str | None]) -> dict[str, tuple[str, str | None]]:
        """Return pattern and format of the tensors that ``formats`` speaks of.

        A name counts before a wildcard, and of several patterns of a kind the first.
        """
        chosen: dict[str, tuple[str, str | None]] = {}
        for pattern in sorted(formats, key=is_wild):
            for name in self.below(pattern, "formats"):
                chosen.setdefault(name, (pattern, formats[pattern]))
        return chosen

    def _matched(self, pattern: str, parameter: str) -> set[str]:
        matched = {path for path in self._paths if matches(pattern, path)}
        if not matched:
            message = f"{pattern!r} in {parameter} matches nothing in the model"
            if self.strict:
                raise ConfigError(message, hint=self._nearest(pattern) or "name modules by their dotted path")
            _log.warning("%s", message)
        return matched

    def _nearest(self, pattern: str) -> str:
        pattern = pattern.removeprefix(_REGULAR).replace(r"\.", ".").replace("[.]", ".")
        pieces = pattern.count(".") + 1
        ends = {".".join(path.split(".")[-pieces:]) for path in self._paths}
        return nearest_names(pattern, [*ends, *self._paths])
