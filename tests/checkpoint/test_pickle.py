from __future__ import annotations

import io
import logging
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from tuckaway.checkpoint import Checkpoint, TensorEntry
from tuckaway.checkpoint.entry import ResidentEntry, StridedEntry
from tuckaway.checkpoint.pickle import read_pickle
from tuckaway.errors import (
    CheckpointError,
    CheckpointNotFound,
    HeaderError,
    TruncatedError,
    UnsafeFormatError,
    UnsafePathError,
)


def state_dict() -> dict[str, torch.Tensor]:
    base = torch.arange(12.0).reshape(3, 4)
    return {
        "plain": base,
        "tied": base,
        "row": base[1],
        "column": base[:, 1],
        "transposed": base.t(),
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "permuted": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        "scalar": torch.tensor(5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.full((5,), 1.5, dtype=torch.bfloat16)),
        "flags": torch.tensor([True, False, True]),
        "fp8": torch.ones(3, dtype=torch.float8_e4m3fn),
        "complex": torch.ones(2, dtype=torch.complex64),
        "u16": torch.arange(3, dtype=torch.int32).to(torch.uint16),
    }


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    def raw(tensor):
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(raw(left), raw(right))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(state_dict(), path)
    return path


def test_every_tensor_is_streamed_from_its_place(path):
    expected = state_dict()
    checkpoint = Checkpoint.open(path)
    assert checkpoint.entries.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same(checkpoint.read(name), tensor), name
    for piece_bytes in (1, 20, 1 << 20):
        found = {name: [] for name in expected}
        for piece in checkpoint.stream(piece_bytes=piece_bytes):
            assert piece.start == sum(map(len, found[piece.entry.name]))
            assert piece.entry.name == "permuted" or len(piece.tensor) <= max(
                1, piece_bytes // piece.tensor.itemsize
            )
            found[piece.entry.name].append(piece.tensor.clone())
        for name, tensor in expected.items():
            assert same(torch.cat(found[name]).reshape(tensor.shape), tensor), name
    kinds = {name: type(entry) for name, entry in checkpoint.entries.items()}
    strided = {"column", "transposed", "expanded", "permuted"}
    assert kinds == {name: StridedEntry if name in strided else TensorEntry for name in expected}
    assert checkpoint.entries["tied"].offset == checkpoint.entries["plain"].offset


def test_a_warning_names_the_file_and_the_safer_way(path, caplog):
    with caplog.at_level(logging.WARNING, "tuckaway"):
        Checkpoint.open(path)
    assert str(path) in caplog.text
    assert "safetensors version of it is safer" in caplog.text


def test_the_format_before_torch_1_6_is_read_into_memory(tmp_path, caplog):
    path = tmp_path / "old.bin"
    known = {name: tensor for name, tensor in state_dict().items() if name not in ("fp8", "u16")}
    torch.save(known, path, _use_new_zipfile_serialization=False)
    checkpoint = Checkpoint.open(path)
    assert "read into memory" in caplog.text
    for name, tensor in known.items():
        assert isinstance(checkpoint.entries[name], ResidentEntry)
        assert same(checkpoint.read(name), tensor)
    pieces = [piece.tensor.clone() for piece in checkpoint.stream(["transposed"], piece_bytes=16)]
    assert torch.equal(torch.cat(pieces), known["transposed"].reshape(-1))


def test_what_may_surround_a_state_dict(tmp_path, caplog):
    path = tmp_path / "x.pt"
    torch.save({"state_dict": OrderedDict(w=torch.ones(2)), "epoch": 3}, path)
    assert read_pickle(path).keys() == {"w"}
    torch.save({"w": torch.ones(2), "_extra_state": b"x", "epoch": 3}, path)
    assert read_pickle(path).keys() == {"w"}
    assert "2 items are no tensors and are passed over: _extra_state, epoch" in caplog.text
    torch.save({}, path)
    assert read_pickle(path) == {}


@pytest.mark.parametrize(
    "make",
    [
        lambda: [torch.ones(1)],
        lambda: torch.ones(1),
        lambda: {"epoch": 1},
        lambda: {1: torch.ones(1)},
        lambda: {"w": torch.ones(2, 2).to_sparse()},
        lambda: {"w": torch.ones(2, dtype=torch.complex64).conj()},
        lambda: {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
    ],
    ids=["list", "tensor", "numbers", "number as name", "sparse", "conjugated", "quantized"],
)
@pytest.mark.filterwarnings("ignore")  # torch warns of sparse and of quantized tensors
def test_what_is_no_state_dict_of_plain_tensors(tmp_path, make):
    path = tmp_path / "x.bin"
    torch.save(make(), path)
    with pytest.raises(UnsafeFormatError):
        read_pickle(path)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def save_modern(content, path):
    torch.save(content, path)


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_bare(content, path):
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("save", [save_modern, save_legacy, save_bare])
def test_a_payload_is_refused_and_does_not_run(tmp_path, monkeypatch, save):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, canary = tmp_path / "pytorch_model.bin", tmp_path / "canary"
    save({"w": [1.0], "x": Payload(canary)}, path)
    with pytest.raises(UnsafeFormatError, match="use a safetensors version") as caught:
        Checkpoint.open(tmp_path)
    assert "weights_only=False" not in str(caught.value)  # what torch would have a user try
    assert not canary.exists()


def test_a_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.bin")
    with pytest.raises(UnsafeFormatError):
        read_pickle(tmp_path / "x.bin")


def rewrite(path, change, compression=zipfile.ZIP_STORED):
    """Write an archive anew with the record ``data.pkl``, or what ``change`` names, changed."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))


def test_an_archive_that_another_tool_wrote_is_read_into_memory(path, caplog):
    rewrite(path, lambda name, data: data)
    checkpoint = Checkpoint.open(path)
    assert "not written by torch.save alone" in caplog.text
    for name, tensor in state_dict().items():
        assert same(checkpoint.read(name), tensor)


def test_a_compressed_archive_is_refused(path):
    rewrite(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsafeFormatError, match="compressed"):
        read_pickle(path)


def test_big_endian_numbers_are_refused(path):
    rewrite(path, lambda name, data: b"big" if name.endswith("byteorder") else data)
    with pytest.raises(UnsafeFormatError, match="big-endian"):
        read_pickle(path)


def test_a_record_that_is_there_twice_is_refused(path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0], b"")
    with pytest.raises(UnsafeFormatError, match="twice"):
        read_pickle(path)


def forge(
    path, name: str, shape: tuple[int, ...], stride: tuple[int, ...], numel: int, offset: int = 0
) -> None:
    """Write an archive with four floats and a pickle that says of them whatever it likes."""
    original = torch.arange(4.0)
    pickled = io.BytesIO()

    class Pickler(pickle._Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if value == "the storage" else None

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (
                "the storage",
                offset,
                shape,
                stride,
                False,
                OrderedDict(),
            )

    Pickler(pickled, 2).dump({name: Tensor()})
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", pickled.getvalue(), len(pickled.getvalue()))
    raw = original.numpy().tobytes()
    writer.write_record("data/0", raw, len(raw))
    writer.write_end_of_file()


def test_an_honest_forgery_is_read(tmp_path):
    forge(tmp_path / "x.bin", "w", (2, 2), (2, 1), 4)
    checkpoint = Checkpoint.open(tmp_path / "x.bin")
    assert checkpoint.read("w").tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("shape", "stride", "numel", "offset"),
    [
        ((8,), (1,), 8, 0),  # a bigger storage than the record
        ((2**40,), (1,), 2**40, 0),
        ((2, 2), (100, 1), 4, 0),  # a view that leaves the storage
        ((2,), (1,), 4, 3),
        ((2**20,), (0,), 4, 0),  # a bomb: four bytes expanded to four MiB
        ((2**31, 2**31), (0, 0), 4, 0),
    ],
)
def test_sizes_that_lie_are_refused(tmp_path, shape, stride, numel, offset):
    forge(tmp_path / "x.bin", "w", shape, stride, numel, offset)
    with pytest.raises((HeaderError, UnsafeFormatError)):
        read_pickle(tmp_path / "x.bin")


def test_a_file_cut_anywhere_is_refused(path):
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises((TruncatedError, UnsafeFormatError)):
            read_pickle(path)


def test_no_byte_changed_gives_another_error_than_ours(path):
    whole = bytearray(path.read_bytes())
    for at in [*range(0, 1500, 11), *range(len(whole) - 1500, len(whole), 7)]:
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        try:
            checkpoint = Checkpoint.open(path)
            for name in checkpoint.entries:
                checkpoint.read(name)
        except CheckpointError:
            pass


def test_no_file(tmp_path):
    with pytest.raises(CheckpointNotFound):
        read_pickle(tmp_path / "x.bin")
    os.mkfifo(tmp_path / "pipe.bin")
    with pytest.raises(UnsafePathError):
        read_pickle(tmp_path / "pipe.bin")


def test_pickled_shards(tmp_path, caplog):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}}'
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.pickled
    assert [piece.tensor.tolist() for piece in checkpoint.stream()] == [[1, 1], [0, 0]]
    assert caplog.text.count("is a pickle") == 1
