"""A hundred thousand mutated manifests: a typed error each, or pages that can be.

Nearly all mutants end at the checksum. Half of them get it put right first, so that they meet the checks behind it.
"""

from __future__ import annotations

import contextlib
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from fuzzing import Mutator, Tally, assert_clean, hunt, spread
from heavy import count
from tuckaway.checkpoint.seal import sealed_index
from tuckaway.errors import StoreCorrupt, StoreStale
from tuckaway.paging.manifest import Manifest, parse_manifest

SEED = 70
NUMBER = count(9_000, 100_000)
WHERE = Path("manifest.json")
PRINT = "0123456789abcdef" * 4
DOCUMENTS = [
    json.loads(manifest.text())
    for manifest in (
        Manifest(PRINT, 0, (), 4096, ()),
        Manifest("once-" + PRINT, 4096, (0,), 8 * 2**20, ((5,),)),
        Manifest(PRINT, 6 * 4096, (0, 4096, 4096, 8192), 8192, ((1,), (), (2,), (3, 2**32 - 1))),
        Manifest(PRINT, 2**40, tuple(range(0, 2**40, 2**36)), 2**36, tuple((n,) for n in range(16))),
    )
]
DIGITS = re.compile(rb'("tuckaway\.crc32":\s*")[0-9a-f]{8}')


def job(seed: int, number: int) -> Tally:
    mutator = Mutator(DOCUMENTS, seed)

    def mutant() -> bytes:
        text = mutator()
        if mutator.random.random() < 0.5:
            with contextlib.suppress(ValueError):  # it has no place for one, or two
                text = sealed_index(DIGITS.sub(rb"\g<1>00000000", text))
        return text

    def parse(data: bytes) -> None:
        manifest = parse_manifest(data, WHERE)
        edges = [*manifest.starts, manifest.nbytes]
        sizes = [end - start for start, end in pairwise(edges)]
        assert sum(sizes) == manifest.nbytes < 2**63
        assert all(size >= 0 and size % 4096 == 0 for size in sizes)
        assert [len(page) for page in manifest.checksums] == [-(-size // manifest.cell) for size in sizes]
        assert all(0 <= value < 2**32 for page in manifest.checksums for value in page)
        assert parse_manifest(manifest.text(), WHERE) == manifest

    return hunt(mutant, parse, (StoreCorrupt, StoreStale), number)


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_no_manifest_does_harm():
    assert_clean(spread(job, NUMBER, seed=SEED), NUMBER, SEED)
