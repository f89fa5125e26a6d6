"""Shapes that a layout derives: what torch sees, what is stored, as a matrix."""

from __future__ import annotations

import torch

from tuckaway.formats import Layout


def test_matrix_view_of_any_shape() -> None:
    for shape, rows, cols, numel in [
        ((6, 4), 6, 4, 24),
        ((2, 3, 4), 6, 4, 24),
        ((5,), 1, 5, 5),
        ((), 1, 1, 1),
        ((0, 4), 0, 4, 0),
        ((4, 0), 4, 0, 0),
    ]:
        layout = Layout("nf4", shape, torch.float32, 64)
        assert (layout.rows, layout.cols, layout.numel, layout.logical_shape) == (rows, cols, numel, shape)


def test_transposed_swaps_the_last_two_dimensions() -> None:
    layout = Layout("nf4", (7, 6, 4), torch.float16, 64, transposed=True)
    assert layout.logical_shape == (7, 4, 6)
    assert (layout.rows, layout.cols) == (42, 4)
    assert layout.flipped().logical_shape == (7, 6, 4)
    assert layout.flipped().flipped() == layout


def test_with_shape_changes_nothing_else_and_takes_a_size() -> None:
    layout = Layout("int8", (6, 4), torch.bfloat16, transposed=True, int8_threshold=3.0)
    other = layout.with_shape(torch.Size([2, 4]))
    assert other == Layout("int8", (2, 4), torch.bfloat16, transposed=True, int8_threshold=3.0)
    assert type(other.shape) is tuple
    assert hash(other) == hash(layout.with_shape((2, 4)))
