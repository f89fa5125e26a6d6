"""A hundred thousand mutated indexes: a typed error each, or names that all lie inside the folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fuzzing import Mutator, Tally, assert_clean, hunt, spread
from heavy import count
from tuckaway.checkpoint.index import check_one_format, parse_index, resolve_inside
from tuckaway.errors import ShardIndexError, UnsafeFormatError, UnsafePathError

SEED = 40
NUMBER = count(10_000, 100_000)
DOCUMENTS = [
    {"metadata": {"total_size": 8}, "weight_map": {"a": "model-00001-of-00002.safetensors"}},
    {"weight_map": {"a.b": "x.safetensors", "c": "y.safetensors", "é": "sub/x.safetensors"}},
    {
        "metadata": {"total_size": 1.5, "more": [None, {}]},
        "weight_map": {f"l.{i}": f"{i % 3}.safetensors" for i in range(9)},
    },
    {"metadata": {}, "weight_map": {}},
]


def job(folder: Path, seed: int, number: int) -> Tally:
    path = folder / "model.safetensors.index.json"

    def parse(data: bytes) -> None:
        weight_map, metadata = parse_index(data, path)
        assert isinstance(metadata, dict)
        names = sorted(set(weight_map.values()))
        check_one_format(names, path)
        for name in names:
            real = os.path.realpath(resolve_inside(folder, name, path))
            assert real.startswith(os.path.join(folder, "")), real

    return hunt(
        Mutator(DOCUMENTS, seed), parse, (ShardIndexError, UnsafeFormatError, UnsafePathError), number
    )


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_no_index_does_harm(tmp_path):
    folder = Path(os.path.realpath(tmp_path))
    assert_clean(spread(lambda seed, number: job(folder, seed, number), NUMBER, seed=SEED), NUMBER, SEED)
