"""A million mutated safetensors headers: a typed error each, or a file that safetensors accepts too."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors

from fuzzing import Mutator, Tally, assert_clean, hunt, spread
from heavy import count
from tuckaway.checkpoint.entry import FileIdentity
from tuckaway.checkpoint.header import header_length, parse_header
from tuckaway.checkpoint.seal import placeholder, seal
from tuckaway.errors import ChecksumError, HeaderError, TruncatedError

SEED = 20
NUMBER = count(20_000, 1_000_000)
PATH = Path("model.safetensors")


def info(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DOCUMENTS = [
    {},
    {"a": info("U8", [3], 0, 3)},
    {
        "__metadata__": {"format": "pt"},
        "a.weight": info("F32", [2, 3], 0, 24),
        "b": info("BF16", [4], 24, 32),
    },
    {"b": info("F64", [], 8, 16), "a": info("I64", [1], 0, 8), "none": info("F16", [0, 7], 16, 16)},
    {"__metadata__": {}, "é\n": info("BOOL", [2, 2], 0, 4), "x/../y": info("F8_E4M3", [1, 1, 1, 1], 4, 5)},
    {f"layers.{i}.w": info("I16", [i, 2], 2 * i * (i - 1), 2 * i * (i + 1)) for i in range(5)},
]


def sealed_bytes(index: int) -> int:
    return max((i["data_offsets"][1] for i in DOCUMENTS[index].values() if "dtype" in i), default=0)


SIZES = sorted({sealed_bytes(index) for index in range(len(DOCUMENTS))})


def parse(data: bytes) -> None:
    """Do with bytes what ``read_header`` does with a file, and ask safetensors about what is accepted."""
    identity = FileIdentity(0, 0, len(data), 0)
    if len(data) < 8:
        raise TruncatedError("no length")
    start = 8 + header_length(data[:8], len(data), PATH)
    header = parse_header(data[8:start], PATH, start, identity)
    found = dict(safetensors.deserialize(data))
    assert found.keys() == header.entries.keys()
    for name, entry in header.entries.items():
        assert tuple(found[name]["shape"]) == entry.shape
        assert bytes(found[name]["data"]) == data[entry.offset : entry.offset + entry.nbytes]


def job(seed: int, number: int) -> Tally:
    mutator = Mutator(DOCUMENTS, seed)
    pick = mutator.random

    def mutant() -> bytes:
        text = mutator()
        size = _extent(text) if pick.random() < 0.7 else pick.choice(SIZES)
        length = len(text)
        if pick.random() < 0.05:
            length = pick.choice(
                (0, 1, length - 1, length + 1, length + 8, 2**31, 10**8 + 1, 2**63, 2**64 - 1)
            )
        return max(length, 0).to_bytes(8, "little") + text + bytes(size)

    return hunt(mutant, parse, (HeaderError, TruncatedError), number)


def _extent(text: bytes) -> int:
    """Return the data bytes that would fit a text: the end of the last offset that is written in it, if it is small."""
    ends = [part.split(b"]")[0].split(b",")[-1] for part in text.split(b'"data_offsets":[')[1:]]
    numbers = [int(end) for end in ends if end.isascii() and end.isdigit() and len(end) < 4]
    return max(numbers, default=0)


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_no_header_does_harm():
    assert_clean(spread(job, NUMBER, seed=SEED), NUMBER, SEED)


def sealed_job(seed: int, number: int) -> Tally:
    import json
    import random

    document = {
        "__metadata__": {"format": "pt", **placeholder(2)},
        "a": info("F32", [2], 0, 8),
        "b": info("U8", [1], 8, 9),
    }
    text = seal(json.dumps(document, separators=(",", ":")).encode(), [1, 2])
    pick = random.Random(seed)

    def mutant() -> bytes:
        data = bytearray(text)
        at = pick.randrange(len(data))
        while bytes(data) == text:
            data[at : at + pick.choice((0, 1, 1, 1, 2))] = pick.randbytes(pick.choice((0, 1, 1, 1, 2)))
        return bytes(data)

    def parse_sealed(mutated: bytes) -> None:
        size = 8 + len(mutated) + 9
        header = parse_header(mutated, PATH, 8 + len(mutated), FileIdentity(0, 0, size, 0))
        raise AssertionError(f"accepted with {header.metadata}")

    return hunt(mutant, parse_sealed, (HeaderError, TruncatedError, ChecksumError), number)


@pytest.mark.heavy
def test_no_change_of_a_sealed_header_is_accepted():
    number = count(5_000, 100_000)
    tally = spread(sealed_job, number, seed=SEED)
    assert not tally.wrong, tally.wrong[:2]
    assert tally.refused == number
