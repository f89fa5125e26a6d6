"""Pickles are refused by option, by environment and on a torch whose weights_only can be got round."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest
import torch

import tuckaway
from loading import empty_net, net, refused
from tuckaway.checkpoint import Checkpoint
from tuckaway.errors import CheckpointError, UnsafeFormatError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.save(net().state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path


@pytest.mark.parametrize("value", ["0", "false", "No", " off "])
def test_the_environment_refuses_what_the_code_allows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("TUCKAWAY_ALLOW_PICKLE", value)
    with refused(UnsafeFormatError, "TUCKAWAY_ALLOW_PICKLE is off", empty := empty_net()):
        tuckaway.load_and_quantize_model(empty, "nf4", folder, allow_pickle=True)
    with refused(UnsafeFormatError, "TUCKAWAY_ALLOW_PICKLE is off", empty):
        tuckaway.load_checkpoint_and_dispatch(empty, folder, "cpu")


def test_the_environment_allows_no_more_than_the_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUCKAWAY_ALLOW_PICKLE", "1")
    assert Checkpoint.open(folder).pickled
    with pytest.raises(UnsafeFormatError, match="allow_pickle=False"):
        Checkpoint.open(folder, allow_pickle=False)


@pytest.mark.parametrize("version", ["2.6.0", "2.9.1+cu128", "1.13"])
def test_a_torch_with_a_known_bypass_reads_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(UnsafeFormatError, match=r"whose weights_only can be got round.*torch 2.10"):
        Checkpoint.open(folder)


def test_nothing_is_read_without_weights_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: asked.append(k.get("weights_only")) or real(*a, **k))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # torch's own way round it, for everybody
    Checkpoint.open(folder)
    assert asked
    assert set(asked) == {True}


def test_a_compressed_bomb_and_a_record_that_is_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    assert path.stat().st_size < 100_000
    with pytest.raises(UnsafeFormatError, match="compressed"):
        Checkpoint.open(tmp_path)
    torch.save({"w": torch.zeros(4)}, path)
    data = bytearray(path.read_bytes())
    record = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
    struct.pack_into(
        "<II", data, record + 20, 2**31, 2**31
    )  # both sizes of the second record in the directory
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path)
