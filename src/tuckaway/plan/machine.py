"""How fast this machine moves bytes: measured by ``tuckaway doctor``, remembered, and read by the planner."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuckaway.files import make_folder, write_atomically

__all__ = ["Speeds", "cache_folder", "device_name", "known_speeds", "remember_speeds"]

_FILE = "speeds.json"
_VERSION = 1


@dataclass(frozen=True)
class Speeds:
    """Bytes a second; ``None``: not known.

    Args:
        device: name of the accelerator, or ``"cpu"``.
        bus: pinned RAM to the accelerator, in large copies.
        disk: a file that is not in the page cache.
        page_cache: a file that is.
        host: reading RAM, with all cores.
        memory: reading the accelerator's memory.
    """

    device: str
    bus: float | None = None
    disk: float | None = None
    page_cache: float | None = None
    host: float | None = None
    memory: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON has them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Speeds:
        """Read what :meth:`to_dict` wrote; names of later versions are passed over."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in known})


def cache_folder() -> Path:
    """Return the folder of what tuckaway remembers: ``$TUCKAWAY_CACHE``, or ``tuckaway`` in the user's cache."""
    if own := os.environ.get("TUCKAWAY_CACHE"):
        return Path(own)
    if os.name == "nt" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "tuckaway" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuckaway"


def device_name() -> str:
    """Return the name of the accelerator that executes, or ``"cpu"``."""
    if not torch.accelerator.is_available():
        return "cpu"
    kind = torch.accelerator.current_accelerator()
    module = getattr(torch, kind.type, None) if kind is not None else None
    name = getattr(module, "get_device_name", None)
    return str(name()) if callable(name) else str(kind)


def known_speeds() -> Speeds | None:
    """Return the speeds measured on this machine with the accelerator it has; ``None``: never measured.

    A file that cannot be read is as good as none: they are measured again.
    """
    try:
        content = json.loads((cache_folder() / _FILE).read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            return None
        speeds = Speeds.from_dict(content["speeds"][device_name()])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return speeds


def remember_speeds(speeds: Speeds) -> Path:
    """Keep speeds for :func:`known_speeds`, beside those of other accelerators, and return the file.

    Raises:
        StoreError: the folder cannot be written to.
    """
    folder = make_folder(cache_folder())
    path = folder / _FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        others = dict(content["speeds"]) if content["version"] == _VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        others = {}
    others[speeds.device] = speeds.to_dict()
    write_atomically(path, (json.dumps({"version": _VERSION, "speeds": others}, indent=1) + "\n").encode())
    return path
