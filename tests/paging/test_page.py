from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuckaway.config import QuantizationConfig
from tuckaway.paging.page import ALIGNMENT, PageLayout, aligned
from tuckaway.tensor import TensorSpec, quantize

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float64, torch.complex64)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=8))
def test_items_lie_aligned_and_apart(forms):
    layout = PageLayout([((f"t{i}", ""), shape, dtype) for i, (shape, dtype) in enumerate(forms)])
    assert layout.nbytes % ALIGNMENT == 0
    end = 0
    for item in layout.items:
        assert item.offset % ALIGNMENT == 0
        assert item.offset >= end
        end = item.offset + item.nbytes
    assert end <= layout.nbytes < end + ALIGNMENT or not layout.items


@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=8))
def test_views_hold_what_is_written_to_them(forms):
    layout = PageLayout([((f"t{i}", ""), shape, dtype) for i, (shape, dtype) in enumerate(forms)])
    buffer = torch.full((layout.nbytes + 7,), 255, dtype=torch.uint8)
    values = {}
    for key, view in layout.views(buffer).items():
        values[key] = torch.full(view.shape, 3).to(view.dtype)
        view.copy_(values[key])
    for key, view in layout.views(buffer).items():
        assert view.shape == layout[key].shape
        assert torch.equal(view, values[key])
    assert buffer[layout.nbytes :].eq(255).all()


def test_quantized_tensors_lie_as_their_components():
    weight = quantize(torch.randn(33, 65), QuantizationConfig(format="nf4", nested=True))
    spec = TensorSpec.of(weight)
    layout = PageLayout.of({"w": spec, "b": TensorSpec((3,), torch.float16)})
    assert [item.key for item in layout.items] == [*(("w", key) for key in weight.components), ("b", "")]
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    for key, view in layout.components("w", buffer).items():
        view.copy_(weight.components[key])
    assert torch.equal(spec.build(layout.components("w", buffer)).dequantize(), weight.dequantize())


def test_views_on_the_meta_device_take_no_memory():
    layout = PageLayout([(("w", ""), (2**40,), torch.float32)])
    view = layout.views(torch.empty(layout.nbytes, dtype=torch.uint8, device="meta"))["w", ""]
    assert view.shape == (2**40,)


def test_an_empty_page():
    layout = PageLayout([])
    assert layout.nbytes == 0
    assert layout.views(torch.empty(0, dtype=torch.uint8)) == {}


def test_buffers_that_do_not_fit_are_refused():
    layout = PageLayout([(("w", ""), (4,), torch.float32)])
    with pytest.raises(ValueError, match="does not fit"):
        layout.views(torch.empty(255, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        layout.views(torch.empty(256, dtype=torch.int8))
    with pytest.raises(ValueError, match="1-D"):
        layout.views(torch.empty(2, 256, dtype=torch.uint8))


def test_a_layout_does_not_change():
    layout = PageLayout([(("w", ""), (4,), torch.float32)])
    with pytest.raises(AttributeError):
        layout.nbytes = 3
    with pytest.raises(ValueError, match="one name"):
        PageLayout([(("w", ""), (4,), torch.float32), (("w", ""), (4,), torch.float32)])


def test_aligned():
    assert [aligned(n, 8) for n in (0, 1, 7, 8, 9)] == [0, 8, 8, 8, 16]
