from __future__ import annotations

import itertools
import random
import zlib

import pytest
import torch

from tuckaway.paging.checksums import PageSums, cells
from tuckaway.paging.page import PageLayout


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
