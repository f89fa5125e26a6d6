"""What is read at once: planned from headers, no file is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuckaway.checkpoint.batches import Batch, Request, batches, most_bytes, rounded
from tuckaway.checkpoint.entry import StridedEntry, TensorEntry

KIB, MIB = 2**10, 2**20


def entry(
    name: str, numel: int, offset: int, dtype: torch.dtype = torch.uint8, path: str = "a"
) -> TensorEntry:
    return TensorEntry(name, dtype, (numel,), Path(path), offset, numel * dtype.itemsize)


def shape_of(found: list[Batch]) -> list[list[tuple[str, int, int]]]:
    """Name, first element and bytes of every part."""
    return [[(part.entry.name, part.start, part.nbytes) for part in batch.parts] for batch in found]


def planned(*entries: TensorEntry, piece_bytes: int = 1000, **rules: object) -> list[Batch]:
    return list(batches([Request(one, **rules) for one in entries], piece_bytes))  # type: ignore[arg-type]


@st.composite
def a_file(draw: st.DrawFn) -> list[Request]:
    """Tensors of any size, some empty, with gaps of any size between them."""
    requests, offset = [], 0
    for number in range(draw(st.integers(0, 8))):
        dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float64]))
        offset += draw(st.sampled_from([0, 1, 1000, 64 * KIB, 64 * KIB + 1]))
        one = entry(f"{number}", draw(st.integers(0, 3000)), offset, dtype)
        offset += one.nbytes
        align, widest = draw(st.sampled_from([1, 3, 64])), draw(st.sampled_from([0, 4]))
        requests.append(Request(one, align, draw(st.booleans()), widest))
    return requests


@given(a_file(), st.sampled_from([1, 64, 1000, 5000, 100 * KIB]))
def test_every_byte_once_in_order_where_it_may_be(requests, piece_bytes):
    found = list(batches(requests, piece_bytes))
    rules = {request.entry.name: request for request in requests}
    parts = [part for batch in found for part in batch.parts]
    assert [name for name in dict.fromkeys(part.entry.name for part in parts)] == list(rules)
    for name, request in rules.items():
        mine, start = [part for part in parts if part.entry.name == name], 0
        size = request.entry.dtype.itemsize
        for part in mine:
            assert part.start == start
            assert part.start % request.align == 0
            worked_on = part.nbytes // size * max(size, request.widest)
            assert worked_on <= max(piece_bytes, request.align * max(size, request.widest)) or request.whole
            if part.nbytes:
                assert part.offset == request.entry.offset + start * size
            start += part.nbytes // size
        assert start == request.entry.numel
        assert [part.last for part in mine] == [False] * (len(mine) - 1) + [True]
        assert len(mine) == 1 or not request.whole


@given(a_file(), st.sampled_from([1, 64, 1000, 5000, 100 * KIB]))
def test_parts_lie_apart_and_aligned_in_the_buffer_and_the_gaps_before_them(requests, piece_bytes):
    for batch in batches(requests, piece_bytes):
        end_of_buffer, end_of_file = 0, batch.parts[0].offset
        for part in batch.parts:
            assert part.offset == end_of_file + part.between
            assert part.place == end_of_buffer + rounded(part.between)
            assert part.place % 64 == 0
            assert part.between <= 64 * KIB
            end_of_buffer, end_of_file = part.place + rounded(part.nbytes), part.offset + part.nbytes
        assert batch.nbytes == end_of_buffer
        largest = max(part.nbytes for part in batch.parts)
        assert batch.nbytes <= max(most_bytes(requests, piece_bytes), rounded(largest))


def test_small_neighbours_are_read_at_once():
    a, b, c = entry("a", 10, 0), entry("b", 0, 10), entry("c", 10, 10)
    assert shape_of(planned(a, b, c)) == [[("a", 0, 10), ("b", 0, 0), ("c", 0, 10)]]


def test_small_gaps_are_read_over_and_large_ones_are_not():
    near, far = entry("near", 1, 10 + 64 * KIB), entry("far", 1, 10 + 64 * KIB + 1)
    first = entry("a", 10, 0)
    assert len(planned(first, near, piece_bytes=MIB)) == 1
    assert len(planned(first, far, piece_bytes=MIB)) == 2


@pytest.mark.parametrize(
    "second",
    [
        entry("b", 10, 10, path="b"),
        entry("b", 10, 0),  # what was read already
        StridedEntry("b", torch.uint8, (10,), Path("a"), 10, 10, stride=(1,)),
    ],
    ids=["another file", "backwards", "no plain tensor"],
)
def test_what_does_not_join(second):
    assert len(planned(entry("a", 10, 0), second)) == 2


def test_a_call_takes_so_many_parts():
    every = [entry(f"{n}", 1, n) for n in range(600)]
    assert [len(batch.parts) for batch in planned(*every, piece_bytes=MIB)] == [256, 256, 88]


def test_a_large_tensor_fills_the_room_behind_a_small_one_where_that_is_worth_a_read():
    small, large = entry("s", 64, 0), entry("l", 12 * MIB, 64)
    assert shape_of(planned(small, large, piece_bytes=8 * MIB)) == [
        [("s", 0, 64), ("l", 0, 8 * MIB - 64)],
        [("l", 8 * MIB - 64, 4 * MIB + 64)],
    ]
    assert shape_of(planned(small, large, piece_bytes=4 * MIB))[0] == [("s", 0, 64)]
    whole = planned(small, large, piece_bytes=8 * MIB, whole=True)
    assert shape_of(whole) == [[("s", 0, 64)], [("l", 0, 12 * MIB)]]


def test_parts_end_where_the_caller_can_take_them():
    one = replace(entry("w", 100, 0, torch.bfloat16))
    assert shape_of(planned(one, piece_bytes=100, align=32)) == [
        [("w", 0, 64)],
        [("w", 32, 64)],
        [("w", 64, 64)],
        [("w", 96, 8)],
    ]
