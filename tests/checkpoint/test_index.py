from __future__ import annotations

import json
import os

import psutil
import pytest
import torch
from safetensors.torch import save_file

from tuckaway.checkpoint import Checkpoint
from tuckaway.checkpoint.index import find_weights, read_index, resolve_inside, shard_names
from tuckaway.errors import (
    CheckpointNotFound,
    ShardIndexError,
    TuckawayError,
    UnsafeFormatError,
    UnsafePathError,
)

INDEX = "model.safetensors.index.json"


def write_index(folder, weight_map, name=INDEX, **more):
    path = folder / name
    path.write_text(json.dumps({"metadata": {"total_size": 8.0}, "weight_map": weight_map, **more}))
    return path


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint of two shards with two tensors each."""
    for shard, names in {"1.safetensors": "ab", "2.safetensors": "cd"}.items():
        save_file({name: torch.full((2,), float(ord(name))) for name in names}, tmp_path / shard)
    write_index(
        tmp_path, {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors", "d": "2.safetensors"}
    )
    return tmp_path


def test_an_index_leads_to_its_shards(sharded):
    index = read_index(sharded / INDEX)
    assert index.shards == {name: sharded / name for name in ("1.safetensors", "2.safetensors")}
    assert index.metadata == {"total_size": 8.0}
    assert not index.pickled
    for location in (sharded, str(sharded / INDEX)):
        checkpoint = Checkpoint.open(location)
        assert list(checkpoint.entries) == ["a", "b", "c", "d"]
        assert [path.name for path in checkpoint.files] == ["1.safetensors", "2.safetensors"]
        assert checkpoint.read("c").tolist() == [99.0, 99.0]


PATHS = r"""
    ../x.safetensors        ..\x.safetensors          a/../../x.safetensors     a\..\..\x.safetensors     ..
    .                       ./                        /                         \                         a/..
    /x.safetensors          /etc/x.safetensors        //x.safetensors           //host/share/x.safetensors
    \x.safetensors          \\x.safetensors           \\host\share\x.safetensors                          \..
    \\?\C:\x.safetensors    \\.\pipe\x.safetensors    //?/C:/x.safetensors      \\?\UNC\host\share\x.safetensors
    C:x.safetensors         C:\x.safetensors          C:/x.safetensors          c:..\x.safetensors        C:
    z:/../x.safetensors     file:///x.safetensors     http://host/x.safetensors x.safetensors:stream.safetensors
    ~/x.safetensors         ~root/x.safetensors       a/b/../../../x.safetensors                          ../
    ./../x.safetensors      a/./../../x.safetensors   a//../..//x.safetensors   ..//x.safetensors         ..\
    a\../..\x.safetensors   a/..\..\x.safetensors     ../../../../etc/passwd.safetensors                  a/../..
    .\..\x.safetensors      a\.\..\..\x.safetensors   ./a/../../x.safetensors   ....//../x.safetensors    ./..
"""
PATHS = [
    *PATHS.split(),
    ".. /x.safetensors",
    " ../x.safetensors",
    "..\t/x.safetensors",
    "a/ .. /x.safetensors",
]


@pytest.mark.parametrize("name", [*PATHS, "", "a\0.safetensors", "a\n.safetensors", " .. /x.safetensors"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with pytest.raises(UnsafePathError, match="leads out"):
        resolve_inside(inside, name)


@pytest.mark.parametrize("name", PATHS)
def test_nothing_outside_is_opened(tmp_path, monkeypatch, name):
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *args: opened.append(str(path)) or real(path, *args))
    path = write_index(tmp_path, {"a": name})
    with pytest.raises(TuckawayError):
        Checkpoint.open(path)
    assert opened == [str(path)]


@pytest.mark.parametrize(
    "name", ["x.safetensors", "sub/x.safetensors", "./x.safetensors", "a..b.safetensors", "é ☃.bin"]
)
def test_names_inside_are_let_be(tmp_path, name):
    assert resolve_inside(tmp_path, name) == tmp_path / name


def test_a_link_out_of_the_folder_is_refused(sharded, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "2.safetensors"
    (sharded / "2.safetensors").rename(outside)
    (sharded / "2.safetensors").symlink_to(outside)
    with pytest.raises(UnsafePathError, match=r"is a link to .*outside"):
        Checkpoint.open(sharded)


def test_a_link_to_a_folder_outside_is_refused(sharded, tmp_path_factory):
    (sharded / "sub").symlink_to(tmp_path_factory.mktemp("outside"))
    with pytest.raises(UnsafePathError, match="is a link"):
        resolve_inside(sharded, "sub/x.safetensors")


def test_a_link_to_the_one_file_of_a_folder_is_refused_too(tmp_path, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "model.safetensors"
    save_file({"a": torch.ones(1)}, outside)
    (tmp_path / "model.safetensors").symlink_to(outside)
    with pytest.raises(UnsafePathError):
        Checkpoint.open(tmp_path)
    assert Checkpoint.open(tmp_path / "model.safetensors").entries.keys() == {
        "a"
    }  # whoever names it means it


def test_links_inside_and_a_linked_folder_work(sharded, tmp_path_factory):
    (sharded / "2.safetensors").rename(sharded / "other.safetensors")
    (sharded / "2.safetensors").symlink_to("other.safetensors")
    link = tmp_path_factory.mktemp("links") / "checkpoint"
    link.symlink_to(sharded)
    assert Checkpoint.open(link).read("d").tolist() == [100.0, 100.0]


def test_the_hub_cache_links_from_snapshots_to_blobs(sharded, tmp_path_factory):
    repo = tmp_path_factory.mktemp("cache") / "models--org--name"
    snapshot, blobs = repo / "snapshots" / ("0" * 40), repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    assert len(Checkpoint.open(snapshot).entries) == 4
    elsewhere = repo / "elsewhere"
    (blobs / f"{1:064x}").rename(elsewhere)
    (snapshot / "2.safetensors").unlink()
    (snapshot / "2.safetensors").symlink_to("../../elsewhere")
    with pytest.raises(UnsafePathError):
        Checkpoint.open(snapshot)


def test_a_missing_shard(sharded):
    (sharded / "2.safetensors").unlink()
    with pytest.raises(ShardIndexError, match=r"1 of 2 shards are missing: 2\.safetensors"):
        Checkpoint.open(sharded)
    assert shard_names(sharded / INDEX) == ["1.safetensors", "2.safetensors"]


def test_a_pipe_as_a_shard(sharded):
    (sharded / "2.safetensors").unlink()
    os.mkfifo(sharded / "2.safetensors")
    with pytest.raises(UnsafePathError):
        Checkpoint.open(sharded)


def test_a_tensor_in_two_shards(sharded):
    save_file({name: torch.zeros(2) for name in "acd"}, sharded / "2.safetensors")
    with pytest.raises(ShardIndexError, match=r"'a' lies in two shards, 1\.safetensors and 2\.safetensors"):
        Checkpoint.open(sharded)


def test_every_disagreement_of_index_and_shards_is_found(sharded):
    good = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors", "d": "2.safetensors"}
    for name in good:
        other = "1.safetensors" if good[name] == "2.safetensors" else "2.safetensors"
        write_index(sharded, {**good, name: other})
        with pytest.raises(ShardIndexError, match=f"'{name}' is to lie in {other} and lies in"):
            Checkpoint.open(sharded)
        write_index(sharded, {key: value for key, value in good.items() if key != name})
        with pytest.raises(ShardIndexError, match=f"'{name}' lies in .* and is not in the index"):
            Checkpoint.open(sharded)
    write_index(sharded, {**good, "e": "1.safetensors"})
    with pytest.raises(ShardIndexError, match=r"'e' is to lie in 1\.safetensors and does not"):
        Checkpoint.open(sharded)


NO_INDEXES = [
    "",
    "[]",
    "{}",
    '{"weight_map": []}',
    '{"weight_map": {"a": 1}}',
    '{"weight_map": {"a": null}}',
    "\xff",
    "nul\0",
]
NO_INDEXES += ["[" * 9999, '{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}']


@pytest.mark.parametrize("text", NO_INDEXES)
def test_what_is_no_index(tmp_path, text):
    path = tmp_path / INDEX
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ShardIndexError, match=INDEX):
        read_index(path)


def test_an_index_too_long_to_be_one(tmp_path):
    path = write_index(tmp_path, {})
    os.truncate(path, 1 << 30)
    with pytest.raises(ShardIndexError, match="longer"):
        read_index(path)


def test_mixed_and_foreign_formats(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"")
    for index, names in {
        INDEX: ["1.safetensors", "x.bin"],
        "pytorch_model.bin.index.json": ["1.safetensors", "x.bin"],
        "model.index.json": ["x.exe"],
    }.items():
        path = write_index(tmp_path, {str(i): name for i, name in enumerate(names)}, index)
        with pytest.raises(UnsafeFormatError):
            read_index(path)


def test_an_index_of_nothing(tmp_path):
    assert Checkpoint.open(write_index(tmp_path, {})).entries == {}


@pytest.mark.parametrize(
    ("names", "chosen", "passed_over"),
    [
        (
            ["model.safetensors", INDEX, "pytorch_model.bin"],
            "model.safetensors",
            (INDEX, "pytorch_model.bin"),
        ),
        ([INDEX, "1.safetensors", "pytorch_model.bin"], INDEX, ("pytorch_model.bin",)),
        (["pytorch_model.bin", "optimizer.bin"], "pytorch_model.bin", ()),
        (["net.safetensors", "pytorch_model.bin"], "pytorch_model.bin", ()),
        (["adapter_model.safetensors", "adapter_model.bin"], "adapter_model.safetensors", ()),
        (["x.safetensors.index.json", "x-1.safetensors", "x-2.safetensors"], "x.safetensors.index.json", ()),
        (["net.pth", "optimizer.pt", "rng_state.pth", "config.json"], "net.pth", ()),
    ],
)
def test_which_file_of_a_folder_is_read(tmp_path, names, chosen, passed_over):
    for name in names:
        (tmp_path / name).touch()
    assert find_weights(tmp_path) == (tmp_path / chosen, passed_over)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "it is empty"),
        (["config.json", ".model.safetensors.x.tmp"], r"it has config\.json"),
        (["a.safetensors", "b.safetensors"], r"2 candidates, .*: a\.safetensors, b\.safetensors"),
        (["a.safetensors.index.json", "b.safetensors.index.json"], "2 candidates"),
        (["a.pth", "b.pt"], "2 candidates"),
    ],
)
def test_a_folder_without_a_clear_choice(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointNotFound, match=message):
        find_weights(tmp_path)


def test_the_shards_of_pickles_are_known_as_such(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"")
    assert read_index(write_index(tmp_path, {"a": "x.bin"}, "pytorch_model.bin.index.json")).pickled
    assert not read_index(write_index(tmp_path, {})).pickled


def test_names_of_shards_that_are_not_there_yet_are_checked_too(tmp_path):
    with pytest.raises(UnsafePathError):
        shard_names(write_index(tmp_path, {"a": "../x.safetensors"}))
    with pytest.raises(UnsafeFormatError):
        shard_names(write_index(tmp_path, {"a": "x.bin"}))
    with pytest.raises(UnsafeFormatError, match="mixes"):
        shard_names(
            write_index(tmp_path, {"a": "x.bin", "b": "x.safetensors"}, "pytorch_model.bin.index.json")
        )
    names = {str(number): f"{number}.safetensors" for number in (2, 1, 3)}
    assert shard_names(write_index(tmp_path, names)) == ["1.safetensors", "2.safetensors", "3.safetensors"]


def test_an_index_is_closed_whatever_it_holds(sharded):
    before = psutil.Process().num_fds()
    read_index(sharded / INDEX)
    os.truncate(sharded / INDEX, 1 << 30)
    with pytest.raises(ShardIndexError):
        read_index(sharded / INDEX)
    assert psutil.Process().num_fds() == before


def test_an_index_may_be_as_long_as_a_header(sharded, monkeypatch):
    monkeypatch.setattr("tuckaway.checkpoint.index.MAX_HEADER", (sharded / INDEX).stat().st_size)
    assert len(read_index(sharded / INDEX).weight_map) == 4
    monkeypatch.setattr("tuckaway.checkpoint.index.MAX_HEADER", (sharded / INDEX).stat().st_size - 1)
    with pytest.raises(ShardIndexError, match="longer"):
        read_index(sharded / INDEX)
