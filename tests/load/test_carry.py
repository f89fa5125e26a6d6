"""How much of a checkpoint is read at once."""

from __future__ import annotations

import torch

from tuckaway.checkpoint import Ring
from tuckaway.load.carry import PIECE_BYTES, piece_bytes


def test_pieces_that_the_cpu_works_on_stay_in_its_cache_and_pinned_ones_are_larger():
    assert piece_bytes(Ring()) == PIECE_BYTES == 4 * 2**20 - 64
    assert piece_bytes(Ring(16, 14, (torch.device("cuda", 0),))) == 16 * 2**20 - 64
