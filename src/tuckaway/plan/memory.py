"""How much memory there is: free bytes by device, and budgets as users write them."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from tuckaway.errors import PlanError

__all__ = ["Device", "MaxMemory", "budgets", "format_bytes", "get_max_memory", "parse_bytes"]

_log = logging.getLogger("tuckaway")

Device = int | str
"""An accelerator's index, ``"mps"``, ``"cpu"`` or ``"disk"``."""

MaxMemory = Mapping[int | str, int | str]

_CGROUP = Path("/sys/fs/cgroup")
"""Where Linux (cgroup v2) tells a container its own limits."""

_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", 1):
    _UNITS |= {f"{_prefix}B": 1000**_power, f"{_prefix}IB": 1024**_power}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(size: int | float | str) -> int:
    """Read a number of bytes as users write it.

    ``"GB"`` is 10^9 and ``"GiB"`` 2^30 bytes, in any case (``"10gb"`` is never ten gigabits).

    Raises:
        PlanError: it is negative or no size.

    Example:
        >>> parse_bytes("1.5GiB"), parse_bytes("10MB"), parse_bytes(7)
        (1610612736, 10000000, 7)
    """
    if isinstance(size, int | float) and not isinstance(size, bool) and size >= 0 and math.isfinite(size):
        return int(size)
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    unit = None if found is None else _UNITS.get(found[2].upper())
    if found is None or unit is None:
        raise PlanError(
            f"{size!r} is no size in bytes", hint="use an int, or a string such as '10GB' or '500MiB'"
        )
    return int(float(found[1]) * unit)


def format_bytes(count: int) -> str:
    """Write a number of bytes for people.

    >>> format_bytes(1_210_000_000), format_bytes(12)
    ('1.21 GB', '12 bytes')
    """
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.2f} {unit}"
    return f"{count} bytes"


def get_max_memory(max_memory: MaxMemory | None = None) -> dict[Device, int]:
    """Return bytes by device: what is free now, or the given budgets read and put in order.

    Args:
        max_memory: bytes by device, ints or strings such as ``"10GB"``; a device that is not named is not used
            (but the disk always is, without limit, unless it is named). ``None``: what is free on every accelerator
            and in RAM.

    Returns:
        Accelerators by index, then ``"mps"``, ``"cpu"``, ``"disk"``.

    Raises:
        PlanError: a device or size nobody knows.
    """
    limits = budgets(max_memory)
    present = accelerator_count()
    absent = [d for d in max_memory or () if isinstance(d, int) and not 0 <= d < present]
    if absent:
        _log.warning("max_memory names accelerators %s, and this machine has %d", absent, present)
    return limits


def budgets(max_memory: MaxMemory | None = None) -> dict[Device, int]:
    """Return what :func:`get_max_memory` does, for accelerators that are only planned for too."""
    if max_memory is None:
        return _free_memory()
    for device in max_memory:
        if isinstance(device, bool) or not (isinstance(device, int) or device in ("mps", "cpu", "disk")):
            raise PlanError(
                f"{device!r} is no device",
                where="max_memory",
                hint="use a GPU's number, 'mps', 'cpu' or 'disk'",
            )
    numbers = sorted(d for d in max_memory if isinstance(d, int))
    order = [*numbers, *(d for d in ("mps", "cpu", "disk") if d in max_memory)]
    return {device: parse_bytes(max_memory[device]) for device in order}


def accelerator_count() -> int:
    """Return the number of accelerators, 0 where there is none."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _free_memory() -> dict[Device, int]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type == "mps":
        return {"mps": _free_ram()}  # one memory: a second budget would count it twice
    found: dict[Device, int] = {}
    for index in range(accelerator_count()):
        free, _ = torch.accelerator.get_memory_info(index)
        # torch keeps freed blocks for itself: they are free to the weights to come
        cached = torch.accelerator.memory_reserved(index) - torch.accelerator.memory_allocated(index)
        found[index] = free + max(cached, 0)
    found["cpu"] = _free_ram()
    return found


def _free_ram() -> int:
    """Free bytes of RAM; in a container, what its limit leaves (which the machine's own figure does not know)."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stats = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    if not limit.isdigit():
        return free
    return max(0, min(free, int(limit) - used + int(stats.get("inactive_file", 0))))
