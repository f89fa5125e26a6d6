from __future__ import annotations

import itertools
import sys
import types
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuckaway.files import checksum, crc32, crc32_combine, is_fast


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_the_sums_of_two_parts_make_that_of_the_whole(a, b):
    assert crc32(a + b) == zlib.crc32(a + b) == crc32(b, crc32(a))
    assert crc32_combine(crc32(a), crc32(b), len(b)) == crc32(a + b)


def test_long_parts_and_many():
    data = bytes(range(256)) * 70_000
    cuts = [0, 1, 3, 16 * 2**20, 16 * 2**20 + 1, len(data)]
    total = 0
    for start, stop in itertools.pairwise(cuts):
        total = crc32_combine(total, crc32(data[start:stop]), stop - start)
    assert total == zlib.crc32(data)


@pytest.mark.parametrize("installed", [True, False])
def test_a_faster_implementation_is_taken_where_there_is_one(monkeypatch, installed):
    fast = types.SimpleNamespace(crc32=lambda data, value: zlib.crc32(data, value) ^ 1)
    package = types.SimpleNamespace(zlib_ng=fast)
    monkeypatch.setitem(sys.modules, "zlib_ng", package if installed else None)
    checksum._fastest.cache_clear()
    assert is_fast() is installed
    assert crc32(b"a") == zlib.crc32(b"a") ^ installed
    checksum._fastest.cache_clear()
