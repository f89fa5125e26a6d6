from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

import generations
from generations import NAMES, ONE_FILE, SIX_SHARDS, TWO_SHARDS, generation_of
from tuckaway.checkpoint import Checkpoint, CheckpointWriter, Request, stream
from tuckaway.errors import (
    CheckpointError,
    DTypeMismatch,
    ShapeMismatch,
    StoreBusy,
    StoreError,
    StoreFull,
    TuckawayError,
)

INDEX = "model.safetensors.index.json"


def write(folder, state, **options):
    with CheckpointWriter(folder, **options) as writer:
        writer.plan([(name, tensor.dtype, tensor.shape) for name, tensor in state.items()])
        for name, tensor in state.items():
            writer.write(name, tensor)
        return writer.commit()


def raw(tensor):
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


STATE = {
    "codes": torch.arange(7, dtype=torch.uint8),
    "absmax": torch.randn(3, 5),
    "half": torch.randn(5).bfloat16(),
    "transposed": torch.randn(4, 3).t(),
    "expanded": torch.tensor(2.0).expand(3, 3),
    "scalar": torch.tensor(5),
    "empty": torch.empty(0, 3),
    "flags": torch.tensor([True, False]),
    "fp8": torch.ones(3, dtype=torch.float8_e5m2),
    "complex": torch.randn(3, dtype=torch.complex64),
    "parameter": torch.nn.Parameter(torch.randn(2)),
}


@pytest.mark.parametrize("size", ["10GB", "40B", 1])
def test_safetensors_reads_every_bit(tmp_path, size):
    paths = write(tmp_path, STATE, max_shard_size=size)
    found = {}
    for path in paths:
        found |= load_file(path)
    assert found.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(raw(found[name]), raw(tensor))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.metadata == {"format": "pt"}
    assert list(checkpoint.entries) == list(STATE)


def test_one_dtype_in_the_order_of_names_gives_the_data_of_safetensors(tmp_path):
    state = {name: torch.randn(3, 4) for name in "abc"}
    save_file(state, tmp_path / "theirs", {"format": "pt"})
    (ours,) = write(tmp_path / "folder", state)
    data, theirs = ours.read_bytes(), (tmp_path / "theirs").read_bytes()
    assert (
        data[8 + int.from_bytes(data[:8], "little") :] == theirs[8 + int.from_bytes(theirs[:8], "little") :]
    )


def test_names_and_index_are_those_of_hugging_face(tmp_path):
    state = {name: torch.full((5,), 1.0) for name in "abc"}
    paths = write(tmp_path, state, max_shard_size=40)
    assert sorted(os.listdir(tmp_path)) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX,
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"].pop("tuckaway.checksums") == "crc32"
    assert len(index["metadata"].pop("tuckaway.crc32")) == 8
    assert index == {
        "metadata": {"total_size": 60},
        "weight_map": dict(zip("abc", [paths[0].name, paths[0].name, paths[1].name], strict=True)),
    }
    assert write(tmp_path / "single", state, metadata={"by": "me"}) == (
        tmp_path / "single" / "model.safetensors",
    )
    assert Checkpoint.open(tmp_path / "single").metadata == {"format": "pt", "by": "me"}


@pytest.mark.filterwarnings("ignore")
def test_accelerate_and_transformers_agree_on_the_folder(tmp_path):
    from accelerate import load_checkpoint_in_model
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    model = torch.nn.Linear(3, 2)
    for size, is_sharded in [("10GB", False), (10, True), ("10GB", False)]:
        state = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
        paths = write(tmp_path, state, max_shard_size=size)
        load_checkpoint_in_model(model, tmp_path)
        assert torch.equal(model.weight, state["weight"])
        found, index = _get_resolved_checkpoint_files(str(tmp_path), None, None, True, False, {}, None, None)
        assert {os.fspath(path) for path in paths} == set(found)
        assert (index is not None) == is_sharded


def test_files_have_ordinary_permissions(tmp_path):
    umask = os.umask(0o027)
    try:
        write(tmp_path, STATE, max_shard_size=40)
    finally:
        os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_pieces_in_any_order_of_tensors(tmp_path):
    with CheckpointWriter(tmp_path, max_shard_size=48) as writer:
        writer.plan([("a", torch.float32, (3, 4)), ("b", torch.float32, (2,)), ("c", torch.int32, ())])
        writer.write("c", torch.tensor(9, dtype=torch.int32))
        writer.write("a", (torch.full((n,), float(n)) for n in (5, 0, 7)))
        writer.write("b", iter([torch.ones(1), torch.zeros(1)]))
        writer.commit()
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read("a").flatten().tolist() == [5.0] * 5 + [7.0] * 7
    assert checkpoint.read("b").tolist() == [1, 0]
    assert checkpoint.read("c") == 9


def test_tensors_bigger_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("tuckaway.checkpoint.writer._CHUNK", 64)
    state = {"big": torch.randn(1000), "odd": torch.randn(77).double(), "t": torch.randn(9, 7).t()}
    write(tmp_path, state)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_no_tensors(tmp_path):
    assert load_file(write(tmp_path, {})[0]) == {}


@pytest.fixture
def planned(tmp_path):
    with CheckpointWriter(tmp_path) as writer:
        writer.plan([("a", torch.float32, (2, 2)), ("b", torch.float32, (1,))])
        yield writer


def test_what_differs_from_the_plan_is_refused(planned):
    with pytest.raises(CheckpointError, match="'c' is not in the plan"):
        planned.write("c", torch.ones(1))
    with pytest.raises(ShapeMismatch, match=r"\[2, 2\] and is \[4\]"):
        planned.write("a", torch.ones(4))
    with pytest.raises(DTypeMismatch, match=r"float32 and is torch\.float16"):
        planned.write("a", torch.ones(2, 2).half())
    with pytest.raises(ShapeMismatch, match="has 3 elements"):
        planned.write("a", [torch.ones(3)])
    with pytest.raises(ShapeMismatch, match="more elements"):
        planned.write("a", [torch.ones(3), torch.ones(2)])
    planned.write("a", torch.ones(2, 2))
    with pytest.raises(CheckpointError, match="written before"):
        planned.write("a", torch.ones(2, 2))
    with pytest.raises(CheckpointError, match="1 tensors were not written: b"):
        planned.commit()
    with pytest.raises(CheckpointError, match="one plan"):
        planned.plan([])
    planned.write("b", torch.ones(1))
    planned.commit()
    with pytest.raises(CheckpointError):
        planned.commit()


def test_without_a_commit_nothing_is_left(tmp_path):
    folder = tmp_path / "new" / "folder"
    with CheckpointWriter(folder) as writer:
        writer.plan([("a", torch.float32, (2,))])
        writer.write("a", torch.ones(2))
        assert len(os.listdir(folder)) == 2  # a temp and the lock
    assert not folder.exists()
    with pytest.raises(CheckpointError), CheckpointWriter(tmp_path) as writer:
        writer.commit()


def test_a_second_writer_is_turned_away_at_once(tmp_path, planned):
    with pytest.raises(StoreBusy, match="another process writes"):
        write(tmp_path, STATE)
    planned.discard()
    write(tmp_path, STATE)


def test_a_full_disk_is_found_before_anything_is_written(tmp_path):
    generations.save(tmp_path, 1, ONE_FILE)
    with pytest.raises(StoreFull, match="are free"), CheckpointWriter(tmp_path) as writer:
        writer.plan([("a", torch.float32, (2**50,))])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(StoreFull, match="cannot reserve"), CheckpointWriter(tmp_path) as writer:
            writer.plan([("a", torch.float32, (2**20,))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["model.safetensors"]


TRANSITIONS = list(itertools.product([ONE_FILE, TWO_SHARDS, SIX_SHARDS], repeat=2))


@pytest.mark.parametrize(("old", "new"), TRANSITIONS)
def test_a_new_checkpoint_replaces_the_old_one_and_nothing_else(tmp_path, old, new):
    kept = ["config.json", "pytorch_model.bin", "adapter_model.safetensors", "model-notes.safetensors"]
    for name in kept:
        (tmp_path / name).touch()
    before = generations.save(tmp_path, 1, old)
    assert generation_of(tmp_path) == 1
    after = generations.save(tmp_path, 2, new)
    assert generation_of(tmp_path) == 2
    index = [INDEX] if len(after) > 1 else []
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, *index, *(path.name for path in after)])
    if len(before) > 1 and len(after) > 1:
        assert not set(before) & set(
            after
        )  # a slow reader's old index leads nowhere rather than to new shards
    assert {int(tensor[0]) // 1000 for tensor in map(Checkpoint.open(tmp_path).read, NAMES)} == {2}


@pytest.mark.parametrize(("old", "new"), TRANSITIONS)
def test_saving_over_what_is_being_read(tmp_path, old, new):
    generations.save(tmp_path, 3, old)
    source = Checkpoint.open(tmp_path)
    with CheckpointWriter(tmp_path, max_shard_size=new) as writer:
        writer.plan([(entry.name, entry.dtype, entry.shape) for entry in source.entries.values()])
        for entry in source.entries.values():
            writer.write(entry.name, (piece.tensor for piece in stream([Request(entry)], piece_bytes=64)))
        writer.commit()
    assert generation_of(tmp_path) == 3


def test_shards_and_temps_of_a_killed_writer_are_cleared_away(tmp_path):
    for name in ("model-00001-of-00009.safetensors", "model-00001-of-00009-0123abcd.safetensors"):
        (tmp_path / name).write_bytes(b"of a writer killed before its index")
    assert generation_of(tmp_path) is None
    paths = generations.save(tmp_path, 1, TWO_SHARDS)
    assert sorted(os.listdir(tmp_path)) == sorted([INDEX, *(path.name for path in paths)])


def test_a_broken_index_is_replaced(tmp_path):
    (tmp_path / INDEX).write_text("{")
    generations.save(tmp_path, 1, TWO_SHARDS)
    assert generation_of(tmp_path) == 1
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "../../x.safetensors"}}')
    generations.save(tmp_path, 2, ONE_FILE)
    assert generation_of(tmp_path) == 2


CALLS = ("open", "pwrite", "fsync", "replace", "unlink", "posix_fallocate")


class FailingCalls:
    """Lets the n-th of all calls of the system fail, and writes down which one that was."""

    def __init__(self, patch, fail_at):
        self.count, self.fail_at, self.failed = 0, fail_at, None
        for name in CALLS:
            patch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name, real):
        def call(*args, **options):
            self.count += 1
            if self.count == self.fail_at:
                self.failed = name
                raise OSError(errno.EIO, "Input/output error")
            return real(*args, **options)

        return call


@pytest.mark.parametrize(("old", "new"), [*itertools.product([ONE_FILE, TWO_SHARDS], repeat=2)])
def test_whatever_call_fails_the_folder_holds_one_generation(tmp_path, old, new):
    generations.save(tmp_path, 1, old)
    for fail_at in itertools.count(1):
        generations.save(tmp_path, 2 * fail_at, old)
        before = set(os.listdir(tmp_path))
        error = None
        with pytest.MonkeyPatch.context() as patch:
            calls = FailingCalls(patch, fail_at)
            try:
                generations.save(tmp_path, 2 * fail_at + 1, new)
            except TuckawayError as raised:
                error = raised
        now = generation_of(tmp_path)
        if calls.failed is None:
            assert error is None
            break
        assert isinstance(error, StoreError | CheckpointError | None)
        assert now in ((2 * fail_at, 2 * fail_at + 1) if error else (2 * fail_at + 1,))
        if now == 2 * fail_at and calls.failed != "unlink":
            assert set(os.listdir(tmp_path)) == before  # nothing of the failed save is left
    assert fail_at > 10
    assert now == 2 * fail_at + 1
