"""The picture: well-formed SVG whose rectangles are to scale."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from tuckaway.plan.accounts import DeviceMemory
from tuckaway.plan.blocks import PlannedBlock
from tuckaway.plan.draw import draw

SVG = "{http://www.w3.org/2000/svg}"


def boxes(text: str) -> dict[str, float]:
    """Width by tooltip."""
    root = ElementTree.fromstring(text)
    return {
        rect.findtext(f"{SVG}title") or "": float(rect.get("width") or 0)
        for rect in root.iter(f"{SVG}rect")
        if rect.find(f"{SVG}title") is not None
    }


def block(
    name: str, device: int | str, nbytes: int, format: str = "nf4", *, paged: bool = False
) -> PlannedBlock:
    return PlannedBlock(name, device, paged, codes_bytes=nbytes, formats={format: nbytes})


def test_widths_are_bytes_on_one_scale():
    blocks = [block("a", 0, 4000), block("b", 0, 2000, "int8"), block("c", "disk", 1000, paged=True)]
    devices = [
        DeviceMemory(0, 6000, 10, slots_bytes=500, reserve_bytes=1000, limit_bytes=8000),
        DeviceMemory("cpu", loading_bytes=9),
        DeviceMemory("disk", 1000, 24),
    ]
    found = boxes(draw("model", "title", blocks, devices))
    scale = found["a: 4.00 kB, nf4"] / 4000
    expected = {
        "b: 2.00 kB, int8": 2000,
        "c: 1.00 kB, nf4, paged": 1000,
        "slots: 500 bytes": 500,
        "reserve: 1.00 kB": 1000,
        "padding: 24 bytes": 24,
    }
    for tip, nbytes in expected.items():
        assert found[tip] == pytest.approx(nbytes * scale, abs=0.011)
    assert sum(found.values()) < 960 * 2


def test_names_are_escaped_and_nothing_is_drawn_of_nothing():
    text = draw("<&>", '"t"', [block("<a>", 0, 5)], [DeviceMemory(0, 5)])
    assert ElementTree.fromstring(text).findtext(f"{SVG}text") == "<&>"
    assert boxes(draw("m", "", [], [])) == {}


def test_a_limit_of_ram_is_for_weights_and_says_so():
    text = draw(
        "m", "", [block("a", "cpu", 1000)], [DeviceMemory("cpu", 1000, buffers_bytes=500, limit_bytes=1200)]
    )
    assert "1.00 kB of 1.20 kB, and 500 bytes of buffers" in re.sub(r"<[^>]*>", " ", text)
