"""What every benchmark records: the machine, the versions, the result as JSON."""

from __future__ import annotations

import json
import platform
import subprocess
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parent / "results"

_PACKAGES = ("torch", "triton", "accelerate", "transformers", "bitsandbytes", "safetensors", "gemlite")


def conditions() -> dict[str, Any]:
    """Return device, driver, versions and size of the machine."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": versions,
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    else:
        found["device"] = f"CPU, {platform.machine()}"
    return found


def private_bytes() -> int:
    """Return this process's private resident memory: what it alone holds, file mappings left out."""
    rollup = Path("/proc/self/smaps_rollup")
    if rollup.exists():
        lines = rollup.read_text().splitlines()
        return 1024 * sum(
            int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Private_Clean"))
        )
    return psutil.Process().memory_full_info().uss


class PeakHost:
    """Watches this process's private resident memory from a thread."""

    def __enter__(self) -> PeakHost:
        self.start = self.peak = private_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, private_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.end = private_bytes()
        self.peak = max(self.peak, self.end)


def save(name: str, results: Any, folder: Path = RESULTS) -> Path:
    """Write ``results`` with the conditions to ``<name>.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(
        json.dumps({"benchmark": name, "conditions": conditions(), "results": results}, indent=1) + "\n"
    )
    return path
