"""A bar of bytes read, with the name of the tensor at hand: :class:`Progress`."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Any

from tqdm import tqdm

__all__ = ["NO_PROGRESS", "Progress"]

NO_PROGRESS = "TUCKAWAY_NO_PROGRESS"
"""Environment variable that, set to anything but nothing, ``0`` or ``false``, silences every bar."""


class _Bar(tqdm):  # type: ignore[misc]
    monitor_interval = 0  # tqdm would start a thread that lives on after the bar


class Progress:
    """A bar on standard error; a context manager that closes it.

    Args:
        total: bytes to come.
        description: what is done, before the bar.
        done: bytes of ``total`` that are there already.
        show: ``True`` or ``False``; ``None``: when standard error is a terminal. The environment variable
            ``TUCKAWAY_NO_PROGRESS`` silences it in every case.

    Example:
        >>> with Progress(2**20, "Loading", show=False) as progress:
        ...     progress.update(2**19, "wte.weight")
    """

    def __init__(self, total: int, description: str, *, done: int = 0, show: bool | None = None) -> None:
        if show is None:
            show = sys.stderr is not None and sys.stderr.isatty()
        if os.environ.get(NO_PROGRESS, "").lower() not in ("", "0", "false"):
            show = False
        self._name: str | None = None
        self._bar: Any = None
        if show:
            self._bar = _Bar(
                total=total,
                initial=done,  # left out of the speed that the remaining time is told from
                desc=description,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                dynamic_ncols=True,
            )

    def update(self, nbytes: int, name: str) -> None:
        """Advance by ``nbytes`` bytes of the tensor ``name``."""
        if self._bar is None:
            return
        if name != self._name:
            self._name = name
            self._bar.set_postfix_str(
                name[-40:], refresh=False
            )  # the end of a name tells it from its neighbours
        self._bar.update(nbytes)

    def close(self) -> None:
        """Leave the bar as it stands. Twice does no harm."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
