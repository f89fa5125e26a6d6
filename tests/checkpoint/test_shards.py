from __future__ import annotations

import pytest
import torch

from tuckaway.checkpoint.shards import as_bytes, plan_shards
from tuckaway.errors import CheckpointError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("10GB", 10**10),
        ("5 GiB", 5 * 2**30),
        ("1.5kb", 1500),
        ("2MiB", 2**21),
        ("7", 7),
        (7, 7),
        ("1T", 10**12),
        ("3B", 3),
    ],
)
def test_sizes(text, nbytes):
    assert as_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 parsec", "0", 0, -5, "1e3", "0.1B", "\uff11GB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="size"):
        as_bytes(text)


def sizes(shards):
    return [[nbytes for _, _, _, nbytes in shard.tensors.values()] for shard in shards]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([], [[]]),
        ([4], [[4]]),
        ([4, 6, 1], [[4, 6], [1]]),
        ([4, 7], [[4], [7]]),
        ([25], [[25]]),  # bigger than a shard may be: alone
        ([1, 25, 1], [[1], [25], [1]]),
        ([0, 10, 0, 0], [[0, 10, 0, 0]]),
        ([5] * 5, [[5, 5], [5, 5], [5]]),
    ],
)
def test_shards_are_filled_in_order(counts, expected):
    specs = [(f"t{index}", torch.uint8, (count,)) for index, count in enumerate(counts)]
    assert sizes(plan_shards(specs, 10, {})) == expected


def test_headers_are_padded_and_offsets_follow_one_another():
    (shard,) = plan_shards([("é", torch.float32, (2, 3)), ("s", torch.int64, ())], 10**9, {"format": "pt"})
    assert len(shard.header) % 8 == 0
    assert int.from_bytes(shard.header[:8], "little") == len(shard.header) - 8
    assert shard.header[8:].rstrip(b" ").decode() == (
        '{"__metadata__":{"format":"pt","tuckaway.checksums":"crc32",'
        '"tuckaway.crc32":"00000000 00000000 00000000"},"é":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        '"s":{"dtype":"I64","shape":[],"data_offsets":[24,32]}}'
    )
    assert shard.nbytes == len(shard.header) + 32


@pytest.mark.parametrize(
    "specs",
    [
        [("a", torch.float32, (1,)), ("a", torch.float32, (1,))],
        [("__metadata__", torch.float32, (1,))],
        [("a", torch.complex128, (1,))],
    ],
    ids=["twice", "reserved", "no dtype of the format"],
)
def test_plans_that_cannot_be(specs):
    with pytest.raises(CheckpointError):
        plan_shards(specs, 10, {})


def test_a_header_too_long_for_the_format(monkeypatch):
    monkeypatch.setattr("tuckaway.checkpoint.shards.MAX_HEADER", 50)
    with pytest.raises(CheckpointError, match="smaller max_shard_size"):
        plan_shards([("a", torch.float32, (1,))], 10, {})
