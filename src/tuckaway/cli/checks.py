"""What is slow or missing on a machine, and what to do about it: :func:`findings` of the :class:`Facts`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from tuckaway import files
from tuckaway.plan import Speeds, cache_folder, format_bytes, get_max_memory

__all__ = ["Facts", "Finding", "findings", "gather"]

_GIB = 2**30


@dataclass(frozen=True)
class Facts:
    """A machine, as far as speed depends on it.

    Args:
        gpu_present: there is an NVIDIA or AMD GPU, whether torch can use it or not.
        torch_build: ``"cuda 13.0"``, ``"rocm 6.4"``, ``"xpu"`` or ``"cpu"``.
        accelerators: name, free and total bytes of those that torch can use.
        triton: it can be imported.
        fast_checksums: zlib-ng is installed.
        interpreted: ``TRITON_INTERPRET`` is set.
        cores: that the process may use.
        threads: that torch uses.
        ram_bytes: of the machine.
        ram_free_bytes: that this process may still take, its container's limit regarded.
        container_bytes: the container's limit; ``None``: none.
        locked_bytes: limit of locked memory (``ulimit -l``); ``None``: none.
        disk_free_bytes: where tuckaway's cache is.
        speeds: measured ones.
    """

    gpu_present: bool = False
    torch_build: str = "cpu"
    accelerators: tuple[Mapping[str, Any], ...] = field(default=())
    triton: bool = False
    fast_checksums: bool = True
    interpreted: bool = False
    cores: int = 1
    threads: int = 1
    ram_bytes: int = 0
    ram_free_bytes: int = 0
    container_bytes: int | None = None
    locked_bytes: int | None = None
    disk_free_bytes: int = 0
    speeds: Speeds | None = None


@dataclass(frozen=True)
class Finding:
    """One thing that costs speed.

    Args:
        what: what is so.
        cost: what it costs.
        do: what helps.
    """

    what: str
    cost: str
    do: str


def findings(facts: Facts) -> list[Finding]:
    """Return what is slow or missing, the worst first; nothing, on a machine that is as it should be."""
    return [finding for check in _CHECKS if (finding := check(facts)) is not None]


def _torch_without_gpu(facts: Facts) -> Finding | None:
    if not facts.gpu_present or facts.accelerators:
        return None
    if facts.torch_build == "cpu":
        return Finding(
            "torch is built for the CPU, and there is a GPU",
            "nothing runs on the GPU",
            "install the build of torch for your GPU: https://pytorch.org/get-started/locally",
        )
    return Finding(
        f"torch is built for {facts.torch_build} and cannot use the GPU",
        "nothing runs on the GPU",
        "update the driver, or look at CUDA_VISIBLE_DEVICES and whether the container was given the GPU",
    )


def _interpreter(facts: Facts) -> Finding | None:
    if not facts.interpreted:
        return None
    return Finding(
        "TRITON_INTERPRET is set",
        "kernels run in Triton's interpreter, thousands of times slower",
        "unset it",
    )


def _no_triton(facts: Facts) -> Finding | None:
    if facts.triton or not facts.accelerators:
        return None
    return Finding(
        "Triton is not installed",
        "weights are decoded by plain torch operations, several times slower",
        "pip install triton (triton-windows on Windows)",
    )


def _slow_checksums(facts: Facts) -> Finding | None:
    if facts.fast_checksums:
        return None
    return Finding(
        "zlib-ng is not installed",
        "checksums are computed by zlib, 1 to 7 GB/s instead of 65: a warm reload takes up to twice as long",
        "pip install zlib-ng; or load with verify_checksums=False",
    )


def _gpu_in_use(facts: Facts) -> Finding | None:
    for number, device in enumerate(facts.accelerators):
        if device["free_bytes"] < device["total_bytes"] // 2:
            free, total = format_bytes(device["free_bytes"]), format_bytes(device["total_bytes"])
            return Finding(
                f"GPU {number} has {free} free of {total}",
                "fewer blocks stay resident",
                "end other processes that use it",
            )
    return None


def _locked(facts: Facts) -> Finding | None:
    limit = facts.locked_bytes
    if limit is None or not facts.accelerators or limit >= facts.ram_bytes // 2:
        return None
    return Finding(
        f"locked memory is limited to {format_bytes(limit)} (ulimit -l)",
        "where the driver obeys it, pages in RAM stay unpinned: 7 instead of 55 GB/s to the GPU",
        "ulimit -l unlimited, or memlock in /etc/security/limits.conf; docker run --ulimit memlock=-1",
    )


def _container(facts: Facts) -> Finding | None:
    if facts.container_bytes is None or facts.container_bytes >= facts.ram_bytes:
        return None
    return Finding(
        f"the container may use {format_bytes(facts.container_bytes)} of {format_bytes(facts.ram_bytes)} RAM",
        "fewer blocks fit into RAM, and the page cache counts too",
        "raise its memory limit if it is yours to raise",
    )


def _page_cache(facts: Facts) -> Finding | None:
    if facts.ram_free_bytes >= 4 * _GIB:
        return None
    return Finding(
        f"{format_bytes(facts.ram_free_bytes)} of RAM are free",
        "files do not stay in the page cache: every load and every page on disk is read from the disk itself",
        "close what takes the memory, or keep weights on the GPU in a smaller format",
    )


def _slow_disk(facts: Facts) -> Finding | None:
    speed = None if facts.speeds is None else facts.speeds.disk
    if speed is None or speed >= 1e9:
        return None
    return Finding(
        f"the disk reads {speed / 1e9:.2f} GB/s",
        f"a checkpoint of 10 GB takes {10e9 / speed:.0f} s to load cold; so does every token of a model paged from it",
        "put checkpoints and offload_folder on a local NVMe disk",
    )


def _slow_bus(facts: Facts) -> Finding | None:
    speed = None if facts.speeds is None else facts.speeds.bus
    if speed is None or speed >= 12e9:
        return None
    return Finding(
        f"the bus to the GPU carries {speed / 1e9:.1f} GB/s",
        "blocks paged from RAM wait for it",
        "see with nvidia-smi -q -d PCIE whether the card has fewer lanes than its slot gives",
    )


def _few_threads(facts: Facts) -> Finding | None:
    if facts.threads >= facts.cores:
        return None
    return Finding(
        f"torch uses {facts.threads} of {facts.cores} cores",
        "what the CPU computes takes longer",
        "unset OMP_NUM_THREADS, or call torch.set_num_threads",
    )


def _never_measured(facts: Facts) -> Finding | None:
    if facts.speeds is not None:
        return None
    return Finding(
        "speeds were never measured", "plans give no times", "tuckaway doctor --measure (a few seconds)"
    )


_CHECKS: tuple[Callable[[Facts], Finding | None], ...] = (
    _torch_without_gpu,
    _interpreter,
    _no_triton,
    _slow_checksums,
    _locked,
    _gpu_in_use,
    _slow_bus,
    _slow_disk,
    _container,
    _page_cache,
    _few_threads,
    _never_measured,
)


def gather(speeds: Speeds | None) -> Facts:
    """Return the facts of this machine."""
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return Facts(
        gpu_present=_gpu_present(),
        torch_build=_torch_build(),
        accelerators=_accelerators(),
        triton=find_spec("triton") is not None,
        fast_checksums=files.is_fast(),
        interpreted=os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"),
        cores=_cores(),
        threads=torch.get_num_threads(),
        ram_bytes=psutil.virtual_memory().total,
        ram_free_bytes=int(get_max_memory().get("cpu", psutil.virtual_memory().available)),
        container_bytes=_container_bytes(),
        locked_bytes=_locked_bytes(),
        disk_free_bytes=shutil.disk_usage(existing).free,
        speeds=speeds,
    )


def _gpu_present() -> bool:
    nodes = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # the last is WSL's
    return bool(torch.accelerator.is_available()) or any(Path(node).exists() for node in nodes)


def _torch_build() -> str:
    if torch.version.hip:
        return f"rocm {torch.version.hip}"
    if torch.version.cuda:
        return f"cuda {torch.version.cuda}"
    found = torch.accelerator.current_accelerator(check_available=False)
    return "cpu" if found is None else found.type


def _accelerators() -> tuple[dict[str, Any], ...]:
    found = []
    for index in range(torch.accelerator.device_count() if torch.accelerator.is_available() else 0):
        free, total = torch.accelerator.get_memory_info(index)
        kind = torch.accelerator.current_accelerator()
        module: Any = getattr(torch, kind.type, None) if kind is not None else None
        name = module.get_device_name(index) if hasattr(module, "get_device_name") else str(kind)
        found.append({"name": name, "free_bytes": free, "total_bytes": total})
    return tuple(found)


def _cores() -> int:
    """Cores that this process may use, without the second threads of each, which torch does not use either."""
    physical = psutil.cpu_count(logical=False) or 1
    return min(physical, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical)


def _container_bytes() -> int | None:
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _locked_bytes() -> int | None:
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft
