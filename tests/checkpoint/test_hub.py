from __future__ import annotations

import json
import logging
import os
from typing import ClassVar

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from tuckaway.checkpoint import Checkpoint, hub
from tuckaway.errors import (
    CheckpointError,
    CheckpointNotFound,
    ShardIndexError,
    UnsafeFormatError,
    UnsafePathError,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub, and no connection."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def put(cache, name: str, write, repo="org/name", commit=COMMIT, ref="main"):
    """Put a file into the cache as a download does: a blob, and a link to it from the snapshot."""
    folder = cache / ("models--" + repo.replace("/", "--"))
    blob = folder / "blobs" / f"{len(os.listdir(folder / 'blobs')) if folder.exists() else 0:064x}"
    link = folder / "snapshots" / commit / name
    for path in (blob, link, folder / "refs" / ref):
        path.parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    write(blob)
    link.symlink_to(os.path.relpath(blob, link.parent))


def test_a_cached_repository_is_found_offline(cache):
    put(cache, "model.safetensors", lambda path: save_file({"w": torch.ones(2)}, path))
    put(cache, "config.json", lambda path: path.write_text('{"a": 1}'))
    checkpoint = Checkpoint.open("org/name")
    assert checkpoint.read("w").tolist() == [1, 1]
    assert checkpoint.config() == {"a": 1}
    assert checkpoint.directory.name == COMMIT
    assert Checkpoint.open("org/name", revision=COMMIT).files == checkpoint.files


def test_a_revision(cache):
    put(cache, "model.safetensors", lambda path: save_file({"w": torch.ones(2)}, path))
    put(cache, "model.safetensors", lambda p: save_file({"v": torch.ones(2)}, p), commit="f" * 40, ref="v1")
    assert Checkpoint.open("org/name").entries.keys() == {"w"}
    assert Checkpoint.open("org/name", revision="v1").entries.keys() == {"v"}
    with pytest.raises(CheckpointNotFound, match="'v2'"):
        Checkpoint.open("org/name", revision="v2")


def sharded(cache, shards=("1.safetensors", "2.safetensors"), index="model.safetensors.index.json"):
    weight_map = {f"w{number}": name for number, name in enumerate(shards)}
    put(cache, index, lambda path: path.write_text(json.dumps({"weight_map": weight_map})))


def test_shards_of_a_cached_repository(cache):
    sharded(cache)
    put(cache, "1.safetensors", lambda path: save_file({"w0": torch.zeros(1)}, path))
    with pytest.raises(CheckpointNotFound, match=r"1 of 2 shards of 'org/name' .*: 2\.safetensors"):
        Checkpoint.open("org/name")
    put(cache, "2.safetensors", lambda path: save_file({"w1": torch.zeros(1)}, path))
    assert Checkpoint.open("org/name").entries.keys() == {"w0", "w1"}


def test_an_index_of_the_hub_is_believed_no_more_than_another(cache):
    sharded(cache, ("../../../secret.safetensors",))
    with pytest.raises(UnsafePathError):
        Checkpoint.open("org/name")


def test_an_index_that_is_none(cache):
    put(cache, "model.safetensors.index.json", lambda path: path.write_text("[]"))
    with pytest.raises(ShardIndexError):
        Checkpoint.open("org/name")


def test_pickles_come_last_and_may_be_refused(cache, caplog):
    put(cache, "pytorch_model.bin", lambda path: torch.save({"w": torch.ones(2)}, path))
    with pytest.raises(UnsafeFormatError, match="'org/name' has pickles only"):
        Checkpoint.open("org/name", allow_pickle=False)
    with caplog.at_level(logging.WARNING, "tuckaway"):
        assert Checkpoint.open("org/name").pickled
    assert "is a pickle" in caplog.text
    put(cache, "model.safetensors", lambda path: save_file({"w": torch.ones(2)}, path))
    assert not Checkpoint.open("org/name").pickled


def test_offline_and_not_cached(cache):
    for name in ("org/name", "gpt2"):
        with pytest.raises(CheckpointNotFound, match=r"no local path, .* cache .*HF_HUB_OFFLINE"):
            Checkpoint.open(name)


def test_a_local_folder_comes_before_the_hub(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    save_file({"local": torch.ones(2)}, tmp_path / "org" / "name" / "model.safetensors")
    put(cache, "model.safetensors", lambda path: save_file({"hub": torch.ones(2)}, path))
    assert Checkpoint.open("org/name").entries.keys() == {"local"}


@pytest.mark.parametrize("text", ["org/name", "gpt2", "a/b.c-d_e", "Org-1/Name.2"])
def test_ids(text):
    assert hub.is_repo_id(text)


NO_IDS = [
    "",
    "/missing",
    "a/b/c",
    "./a",
    "../a",
    "a/",
    "/a",
    "a--b/c",
    "a..b",
    "a b",
    "~/a",
    "C:\\a",
    "é/a",
    "a/b.git",
]
NO_IDS += ["x.safetensors", "org/model.safetensors.index.json", "org/x.bin", "a" * 97, ".hidden", "a/.b"]


@pytest.mark.parametrize("text", NO_IDS)
def test_what_is_no_id(text):
    assert not hub.is_repo_id(text)
    with pytest.raises(CheckpointNotFound, match="no such file or folder"):
        Checkpoint.open(text or "missing/of/all")


class Online:
    """A Hub of given files: what is asked of it is written down, what it lacks raises as the real one does."""

    def __init__(self, cache, files):
        self.cache, self.files, self.asked, self.patterns = cache, files, [], []

    def download(self, repo_id, name, revision=None, local_files_only=False):
        self.asked.append((name, revision, local_files_only))
        if isinstance(self.files, Exception):
            raise self.files
        if name not in self.files:
            raise errors.EntryNotFoundError(f"404: {name}")
        link = self.cache / "models--org--name" / "snapshots" / COMMIT / name
        if not link.exists():
            put(self.cache, name, self.files[name])
        return str(link)

    def snapshot(self, repo_id, revision, allow_patterns):
        self.patterns.append((revision, allow_patterns))
        for name in allow_patterns:
            self.download(repo_id, name, revision)


@pytest.fixture
def online(cache, monkeypatch):
    def online(files):
        fake = Online(cache, files)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot)
        return fake

    return online


def test_only_the_files_that_are_needed_are_downloaded_and_all_of_one_commit(online):
    names = ("1.safetensors", "2[x].safetensors")
    weight_map = {f"w{number}": name for number, name in enumerate(names)}
    fake = online(
        {
            "model.safetensors.index.json": lambda path: path.write_text(
                json.dumps({"weight_map": weight_map})
            ),
            names[0]: lambda path: save_file({"w0": torch.zeros(1)}, path),
            "2[[]x].safetensors": lambda path: None,
            "pytorch_model.bin": lambda path: pytest.fail("not needed"),
        }
    )
    with pytest.raises(CheckpointNotFound, match=r"1 of 2 shards"):
        Checkpoint.open("org/name")
    assert [name for name, _, _ in fake.asked[:3]] == [
        "model.safetensors",
        "model.safetensors.index.json",
        "config.json",
    ]
    assert [revision for _, revision, _ in fake.asked] == [None, None, COMMIT, COMMIT, COMMIT]
    assert fake.patterns == [(COMMIT, ["1.safetensors", "2[[]x].safetensors"])]


def test_an_unreachable_hub_is_asked_once(online):
    fake = online(errors.LocalEntryNotFoundError("no connection"))
    with pytest.raises(CheckpointNotFound, match="HF_HUB_OFFLINE"):
        Checkpoint.open("org/name")
    assert [local for _, _, local in fake.asked] == [False] + [True] * 6


class Response:
    """What huggingface_hub's errors want to know of an answer."""

    status_code = 404
    headers: ClassVar[dict[str, str]] = {}
    request = None
    url = ""


def http_error(kind):
    try:
        return kind("message", response=Response())
    except TypeError:
        return kind("message")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, "neither a local path nor a repository"),
        (errors.GatedRepoError, "access to 'org/name' .*must be asked for"),
        (errors.RevisionNotFoundError, "no revision 'main'"),
    ],
)
def test_refusals_of_the_hub(online, kind, message):
    online(http_error(kind))
    with pytest.raises(CheckpointNotFound, match=message):
        Checkpoint.open("org/name", revision="main")


@pytest.mark.parametrize("error", [RuntimeError("broken pipe"), OSError(28, "No space left on device")])
def test_a_download_that_fails(online, error):
    online(error)
    with pytest.raises(CheckpointError, match="cannot download 'org/name'"):
        Checkpoint.open("org/name")
