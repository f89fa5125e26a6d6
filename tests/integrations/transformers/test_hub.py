"""``push_to_hub`` of a quantized model: everything but the network, whose two requests are answered here."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
from transformers import AutoModelForCausalLM

import tuckaway
from hf_models import saved, tokens


@pytest.fixture
def pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a commit's files are copied to."""
    folder = tmp_path / "pushed"
    folder.mkdir()

    def create_repo(self: Any, repo_id: str, **options: Any) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self: Any, repo_id: str, operations: Any, **options: Any) -> Any:
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, folder / operation.path_in_repo)
        return SimpleNamespace(commit_url="", oid="0")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    # transformers 5.0 imported the functions of an HfApi of its own
    hub = transformers.utils.hub
    for name, function in (("create_repo", create_repo), ("create_commit", create_commit)):
        if hasattr(hub, name):
            monkeypatch.setattr(hub, name, partial(function, None))
    return folder


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_what_is_pushed_is_what_is_loaded(pushed: Path, tmp_path: Path) -> None:
    plain = saved("experts", tmp_path / "plain")
    model = tuckaway.from_pretrained(
        plain, quantization_config="nf4", device_map={"": "disk"}, offload_folder=tmp_path / "pages"
    )
    model.push_to_hub("someone/something")
    assert {"config.json", "model.safetensors"} <= {path.name for path in pushed.iterdir()}
    again = AutoModelForCausalLM.from_pretrained(pushed)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
