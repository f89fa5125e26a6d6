"""What every benchmark records: the machine, the versions, the result as JSON."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil
import torch

RESULTS = Path(__file__).parent / "results"

_PACKAGES = (
    "torch",
    "triton",
    "accelerate",
    "transformers",
    "bitsandbytes",
    "safetensors",
    "gemlite",
    "zlib-ng",
)


@cache
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
    """Write ``results`` with the conditions to ``<name>.json``; whoever reads it finds the old or the new whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps({"benchmark": name, "conditions": conditions(), "results": results}, indent=1) + "\n"
    beside = path.with_suffix(".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
    return path


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after ``seconds`` (in the main thread, where Python code runs)."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Journal:
    """The results of a benchmark, written after every one of them: what ends it early loses nothing.

    Args:
        name: of the JSON file.
        budget: seconds after which no further case is begun; a case that runs then is stopped.
        folder: where the file goes.

    Example:
        >>> journal = Journal("kernels", 150.0, folder)  # doctest: +SKIP
        >>> journal.case({"what": "nf4", "m": 1}, lambda: {"us": 16.6})  # doctest: +SKIP
    """

    def __init__(self, name: str, budget: float, folder: Path = RESULTS) -> None:
        self.name = name
        self.folder = folder
        self.end = time.monotonic() + budget
        self.results: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []

    def left(self) -> float:
        """Return how many seconds are left."""
        return self.end - time.monotonic()

    def case(
        self, about: dict[str, Any], measure: Callable[[], dict[str, Any]], needs: float = 1.0
    ) -> dict[str, Any]:
        """Run ``measure`` and record what it finds; a failure is recorded too, and does not end the benchmark.

        Args:
            about: what is measured.
            measure: returns figures; given up when the time is over.
            needs: seconds it takes; with fewer left it is not begun.
        """
        if self.left() < needs:
            self.left_out.append(about)
            return about
        try:
            with limited(self.left()):
                return self.add(about | measure())
        except Exception as failure:  # of a peer, of a compiler: any, and the cases after it count as well
            return self._failed(about, failure)

    def attempt(self, part: str, run: Callable[[], None], needs: float = 1.0) -> None:
        """Run a part of the benchmark that records its own cases; what fails between them is recorded too.

        Args:
            part: its name.
            run: the part.
            needs: seconds; with fewer left it is not begun.
        """
        if self.left() < needs:
            self.left_out.append({"part": part})
            return
        try:
            run()
        except Exception as failure:
            self._failed({"part": part}, failure)

    def _failed(self, about: dict[str, Any], failure: Exception) -> dict[str, Any]:
        where = traceback.extract_tb(failure.__traceback__)[-1]
        told = f"{failure!r:.300} ({Path(where.filename).name}:{where.lineno})"
        return self.add(about | {"failed": told})

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Record and print one result."""
        self.results.append(row)
        self.save()
        print({k: f"{v:.2e}" if k.startswith("error") else v for k, v in row.items()}, flush=True)
        return row

    def save(self) -> Path:
        """Write what there is."""
        results = {"results": self.results, "not_measured_for_want_of_time": self.left_out}
        return save(self.name, results, self.folder)


def in_process(script: str, arguments: Sequence[str], limit: float) -> dict[str, Any]:
    """Run a script of this folder in a process of its own, and return what it said: JSON objects behind ``RESULT``.

    Args:
        script: its name.
        arguments: for it.
        limit: seconds after which it is killed; what it had said by then is returned, and that it was.

    Raises:
        TimeoutError: it was killed before it said anything.
        RuntimeError: it ended without a result; says the last line of its errors.
    """
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    found: dict[str, Any] = {}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(limit, 1.0))
        said, ended = done.stdout, f"ended with status {done.returncode}" if done.returncode else None
    except subprocess.TimeoutExpired as error:
        said, ended = _text(error.stdout), f"took longer than {limit:.0f} s"
        if "RESULT " not in said:
            raise TimeoutError(ended) from error
    for line in said.splitlines():
        if line.startswith("RESULT "):
            found |= json.loads(line[7:])
    if not found:
        raise RuntimeError(f"no result: {(done.stderr.strip().splitlines() or [ended])[-1]:.250}")
    return found if ended is None else found | {"failed": ended}


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
