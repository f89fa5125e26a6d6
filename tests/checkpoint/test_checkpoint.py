from __future__ import annotations

import logging
import threading

import psutil
import pytest
import torch
from safetensors.torch import save_file

from tuckaway.checkpoint import Checkpoint
from tuckaway.errors import CheckpointError, CheckpointNotFound, UnsafeFormatError, UnsafePathError


@pytest.fixture
def folder(tmp_path):
    save_file(
        {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(7)},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "config.json").write_text('{"model_type": "toy"}')
    return tmp_path


def test_an_open_checkpoint(folder):
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.entries.keys() == {"w", "n"}
    assert checkpoint.files == (folder / "model.safetensors",)
    assert checkpoint.directory == folder
    assert checkpoint.nbytes == 6 * 4 + 8
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.config() == {"model_type": "toy"}
    assert not checkpoint.pickled
    assert checkpoint.read("w").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert checkpoint.read("n") == 7
    assert {piece.entry.name: piece.tensor.tolist() for piece in checkpoint.stream(["w"])} == {
        "w": [0, 1, 2, 3, 4, 5]
    }
    with pytest.raises(KeyError, match=r"no tensor 'nn'.*did you mean 'n'"):
        checkpoint.read("nn")


def test_safetensors_win_over_pickles_which_are_not_opened(folder, caplog):
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with caplog.at_level(logging.INFO, "tuckaway"):
        checkpoint = Checkpoint.open(folder)
    assert checkpoint.files == (folder / "model.safetensors",)
    assert "not pytorch_model.bin beside it" in caplog.text


def test_a_configuration_is_optional_but_must_be_one(folder):
    checkpoint = Checkpoint.open(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        checkpoint.config()
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.config()
    (folder / "config.json").unlink()
    assert checkpoint.config() is None
    (folder / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(UnsafePathError):
        checkpoint.config()


def test_a_path_that_is_not_there_names_what_is_near(folder):
    with pytest.raises(CheckpointNotFound, match=r"did you mean model\.safetensors\?"):
        Checkpoint.open(folder / "modell.safetensors")
    with pytest.raises(CheckpointNotFound, match="no such file or folder"):
        Checkpoint.open(folder / "a" / "b" / "c")
    with pytest.raises(FileNotFoundError):
        Checkpoint.open("./model.safetensors")


def test_files_of_no_known_format(folder):
    with pytest.raises(UnsafeFormatError, match="no known format"):
        Checkpoint.open(folder / "config.json")


def test_pickles_can_be_refused(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeFormatError, match="allow_pickle=False"):
        Checkpoint.open(tmp_path, allow_pickle=False)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "x.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "x.bin"}}')
    with pytest.raises(UnsafeFormatError, match=r"x\.bin"):
        Checkpoint.open(tmp_path, allow_pickle=False)
    assert Checkpoint.open(tmp_path).pickled


def test_nothing_stays_open(folder):
    def use() -> None:
        checkpoint = Checkpoint.open(folder)
        checkpoint.read("w")
        list(checkpoint.stream())

    use()
    process = psutil.Process()
    before = process.num_fds(), threading.active_count()
    for _ in range(3):
        use()
    assert (process.num_fds(), threading.active_count()) == before
