from __future__ import annotations

import builtins
import itertools
import random
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuckaway.paging import checksums as module
from tuckaway.paging.checksums import PageSums, cells, combine, crc32
from tuckaway.paging.page import PageLayout


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_two_checksums_make_one(first, second):
    assert combine(crc32(first), crc32(second), len(second)) == zlib.crc32(first + second)


def test_long_stretches_are_combined():
    zeros = bytes(3 * 2**20 + 5)
    assert combine(crc32(b"x"), crc32(zeros), len(zeros)) == zlib.crc32(b"x" + zeros)


@pytest.mark.parametrize("missing", [(), ("isal",), ("isal", "zlib_ng")])
def test_whatever_is_installed_gives_the_same_value(monkeypatch, missing):
    found = builtins.__import__

    def importing(name, *rest):
        if name.split(".")[0] in missing:
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(module.importlib, "import_module", lambda n: importing(n, {}, {}, ["crc32"], 0))
    module._implementation.cache_clear()
    data = bytes(range(256)) * 40
    assert crc32(data) == zlib.crc32(data)
    assert crc32(data[7:], crc32(data[:7])) == zlib.crc32(data)
    module._implementation.cache_clear()


@pytest.mark.parametrize("cell", [1, 100, 256, 512, 4096, 2**20])
def test_pieces_in_any_order_give_the_checksums_of_the_page(cell):
    layout = PageLayout(
        [((f"t{i}", ""), (n,), torch.uint8) for i, n in enumerate([1, 300, 0, 256, 5000, 77])]
    )
    page = torch.zeros(layout.nbytes, dtype=torch.uint8)
    pieces = []
    chance = random.Random(cell)
    for item in layout.items:
        data = torch.randint(0, 256, (item.nbytes,), dtype=torch.uint8)
        page[item.offset : item.offset + item.nbytes] = data
        cuts = sorted({0, item.nbytes, *(chance.randint(0, item.nbytes) for _ in range(3))})
        pieces += [(item.offset + a, bytes(data[a:b].tolist())) for a, b in itertools.pairwise(cuts)]
    chance.shuffle(pieces)
    sums = PageSums(layout, cell)
    for number, (offset, data) in enumerate(pieces):
        assert sums.missing() is not None, number
        sums.add(offset, data)
    assert sums.missing() is None
    whole = bytes(page.tolist())
    assert sums.finish() == [zlib.crc32(whole[a : a + n]) for a, n in cells(layout.nbytes, cell)]


def test_what_is_missing_or_too_much_is_named():
    sums = PageSums(PageLayout([(("a", ""), (4,), torch.uint8), (("b", ""), (2,), torch.uint8)]), 4096)
    sums.add(0, b"abcd")
    assert sums.missing() == ("b", 0, 2)
    sums.add(256, b"xy")
    sums.add(256, b"xy")
    assert sums.missing() == ("b", 4, 2)
    with pytest.raises(ValueError, match="no component of the page has bytes 3 to 5"):
        sums.add(3, b"de")


def test_a_page_of_nothing_has_no_cells():
    assert PageSums(PageLayout([]), 4096).finish() == []
    assert cells(0) == []
