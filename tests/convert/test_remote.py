"""From a Hub id, over HTTP: shards are quantized as they arrive and, where asked for, dropped; results are pushed."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tuckaway
from convert.fake_hub import COMMIT, Served, serve
from loading import net, read_all

CODE = """
import json, sys, tuckaway
done = tuckaway.quantize_checkpoint("org/name", sys.argv[1], "nf4", **json.loads(sys.argv[2]))
print(json.dumps([done.kept_shards, len(done.files), done.basis, done.address]))
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    tuckaway.save_model(net(), folder, max_shard_size=60_000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("not wanted")
    return folder


def convert(
    served: Served, tmp_path: Path, name: str = "out", **options: Any
) -> subprocess.CompletedProcess[str]:
    """Convert in a process of its own, whose Hub is the served one."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "HF_ENDPOINT": served.address,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_test",
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-c", CODE, str(tmp_path / name), json.dumps(options)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)


def cached_shards(tmp_path: Path) -> list[str]:
    snapshot = tmp_path / "cache" / "hub" / "models--org--name" / "snapshots" / COMMIT
    return sorted(path.name for path in snapshot.glob("*.safetensors"))


def assert_equal_to_a_local_conversion(repository: Path, tmp_path: Path) -> None:
    tuckaway.quantize_checkpoint(repository, tmp_path / "expected", "nf4")
    found, expected = read_all(tmp_path / "out"), read_all(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all((found[key] == value).all() for key, value in expected.items())


@pytest.mark.parametrize("low_disk", [False, True])
def test_shards_come_one_by_one(repository, tmp_path, low_disk):
    with serve(repository) as served:
        done = convert(served, tmp_path, low_disk=low_disk, max_shard_size=20_000)
    assert done.returncode == 0, done.stderr
    kept, files, basis, _ = json.loads(done.stdout)
    assert (kept, basis) == (0, "names and shapes")
    assert files > 2
    assert cached_shards(tmp_path) == (
        [] if low_disk else sorted(p.name for p in repository.glob("*.safetensors"))
    )
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not any("pytorch_model" in path for _, path in served.asked)
    assert_equal_to_a_local_conversion(repository, tmp_path)


def test_the_result_is_pushed(repository, tmp_path):
    with serve(repository) as served:
        done = convert(served, tmp_path, push_to_hub="me/result")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)[3] == f"{served.address}/me/result"
    assert set(served.pushed) == {path.name for path in (tmp_path / "out").iterdir()}
    for name, content in served.pushed.items():
        assert base64.b64decode(content) == (tmp_path / "out" / name).read_bytes()


def test_what_is_quantized_already_is_fetched_whole(repository, tmp_path):
    tuckaway.quantize_checkpoint(repository, tmp_path / "quantized", "nf4")
    with serve(tmp_path / "quantized") as served:
        done = convert(served, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_equal_to_a_local_conversion(repository, tmp_path)


def test_a_hub_that_lies_about_a_shard(repository, tmp_path):
    first = sorted(repository.glob("*.safetensors"))[0]
    with serve(repository) as served:
        done = convert(served, tmp_path, max_shard_size=20_000)
        assert done.returncode == 0, done.stderr
        # the cache is believed to be this commit's; its shard was exchanged for one of other shapes
        blob = next((tmp_path / "cache").rglob(first.name)).resolve()
        blob.write_bytes(sorted(repository.glob("*.safetensors"))[-1].read_bytes())
        done = convert(served, tmp_path, "again")
    assert done.returncode != 0
    assert "is not what the Hub said it was" in done.stderr
    assert not (tmp_path / "again").exists()
