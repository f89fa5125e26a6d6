"""Copies of tied weights are compared bit for bit, in the dtype the model has, piece by piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tuckaway.checkpoint import Checkpoint
from tuckaway.errors import MismatchError
from tuckaway.load.copies import check_copies
from tuckaway.load.match import Match, match_checkpoint
from tuckaway.tensor import TensorSpec


def match(
    folder: Path, first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype = torch.float32
) -> Match:
    save_file({"a": first, "b": second}, folder / "model.safetensors")
    specs = dict.fromkeys("ab", TensorSpec((7, 5), dtype))
    return match_checkpoint(Checkpoint.open(folder), specs, [["a", "b"]], None, real=())


@pytest.mark.parametrize("piece_bytes", [1, 16, 33, 2**20])
def test_equal_copies_pass_and_one_bit_does_not(piece_bytes: int, tmp_path: Path) -> None:
    weight = torch.randn(7, 5)
    weight[0, 0] = float("nan")
    check_copies(match(tmp_path, weight, weight.clone()), piece_bytes=piece_bytes)
    other = weight.clone()
    other[6, 4] = other[6, 4].nextafter(torch.tensor(9.0))
    with pytest.raises(MismatchError, match=r"'a' and 'b' are one weight .* \(model\.safetensors\)"):
        check_copies(match(tmp_path, weight, other), piece_bytes=piece_bytes)


@pytest.mark.parametrize("piece_bytes", [1, 16, 2**20])
def test_copies_of_two_precisions_are_compared_as_the_model_sees_them(
    piece_bytes: int, tmp_path: Path
) -> None:
    weight = torch.randn(7, 5)
    half = weight.to(torch.bfloat16)
    check_copies(match(tmp_path, weight, half, torch.bfloat16), piece_bytes=piece_bytes)
    with pytest.raises(MismatchError):
        check_copies(match(tmp_path, weight, half), piece_bytes=piece_bytes)


def test_a_tie_in_a_pickle_lies_at_one_place(tmp_path: Path) -> None:
    weight = torch.randn(7, 5)
    for second in (weight, weight.clone(), weight.t().contiguous().t()):
        torch.save({"a": weight, "b": second}, tmp_path / "pytorch_model.bin")
        specs = dict.fromkeys("ab", TensorSpec((7, 5), torch.float32))
        checkpoint = Checkpoint.open(tmp_path)
        check_copies(match_checkpoint(checkpoint, specs, [["a", "b"]], None, real=()), piece_bytes=64)
    torch.save(
        {"a": weight, "b": weight + 1}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(MismatchError):
        check_copies(match_checkpoint(checkpoint, specs, [["a", "b"]], None, real=()), piece_bytes=64)
