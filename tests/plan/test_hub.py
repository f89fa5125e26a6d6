"""Planning for a repository on the Hub: from its configuration and headers, with no weights downloaded."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

import tuckaway
from loading import tiny_llama_config
from tuckaway.errors import CheckpointError, CheckpointNotFound

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FREE = {"reserve_bytes": 0}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, and no connection."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    return folder / "snapshots" / COMMIT


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama_config(dtype="bfloat16")).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_configuration_in_the_cache_is_enough(cache: Path, llama: Path) -> None:
    (cache / "config.json").write_bytes((llama / "config.json").read_bytes())
    plan = tuckaway.plan("org/name", **FREE)
    assert plan.blocks == tuckaway.plan(llama, **FREE).blocks
    assert plan.checkpoint_bytes is None
    (cache / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    assert tuckaway.plan("org/name", **FREE).checkpoint_bytes == tuckaway.plan(llama, **FREE).checkpoint_bytes


def test_what_is_neither_there_nor_in_the_cache(cache: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="the Hub was not asked"):
        tuckaway.plan("org/other")
    (cache / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        tuckaway.plan("org/name")


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as headers need: files by range, and a list of them."""

    folder: Path
    sent: int

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/name"):
            files = [{"rfilename": entry.name} for entry in self.folder.iterdir()]
            self._answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": files}).encode())
            return
        file = self.folder / path.rpartition("/")[2]
        if not path.startswith("/org/name/resolve/") or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._answer(file.read_bytes(), file.name)

    def _answer(self, content: bytes, etag: str = "list") -> None:
        given = self.headers.get("Range")
        if given:
            first, _, last = given.removeprefix("bytes=").partition("-")
            content = content[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if given else 200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            type(self).sent += len(content)
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    """A Hub of one repository on this machine."""
    (tmp_path / "repository").mkdir()
    handler = type("Hub", (_Hub,), {"folder": tmp_path / "repository", "sent": 0})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    api = huggingface_hub.HfApi(endpoint=endpoint)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", api.get_safetensors_metadata)
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_only_configuration_and_headers_are_downloaded(hub: type[_Hub], llama: Path) -> None:
    (hub.folder / "config.json").write_bytes((llama / "config.json").read_bytes())
    large = {"model.extra.weight": torch.zeros(4_000_000, dtype=torch.bfloat16)}
    save_file(large, hub.folder / "model.safetensors")
    plan = tuckaway.plan("org/name", **FREE)
    assert plan.checkpoint_bytes == 8_000_000
    assert plan.blocks == tuckaway.plan(llama, **FREE).blocks
    assert hub.sent < 300_000


def test_without_a_configuration_the_headers_tell_the_structure(hub: type[_Hub]) -> None:
    names = {f"layers.{i}.up.weight": torch.zeros(256, 128, dtype=torch.bfloat16) for i in range(4)}
    save_file(names, hub.folder / "model.safetensors")
    plan = tuckaway.plan("org/name", "int8", **FREE)
    assert plan.bytes_by_format() == {"int8": 4 * (256 * 128 + 4 * 256)}
    assert plan.checkpoint_bytes == 4 * 2 * 256 * 128
