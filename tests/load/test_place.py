"""Each destination gives components to fill and has their bytes afterwards."""

from __future__ import annotations

import torch

from tuckaway import QuantizationConfig, quantize
from tuckaway.load.place import Destination, InPage, OnDevice, OnDisk
from tuckaway.tensor import TensorSpec

CPU = torch.device("cpu")
VALUE = quantize(torch.randn(64, 96), QuantizationConfig())
SPECS = {
    "quantized": TensorSpec.of(VALUE),
    "plain": TensorSpec((7, 5), torch.bfloat16),
    "scalar": TensorSpec((), torch.float32),
    "empty": TensorSpec((0, 4), torch.float32),
}


def fill(destination: Destination, spec: TensorSpec) -> dict[str, torch.Tensor]:
    """Fill a destination with known bytes, and return them."""
    components = destination.open(spec)
    assert {k: (tuple(t.shape), t.dtype) for k, t in components.items()} == spec.components()
    written = {}
    for number, (key, part) in enumerate(components.items()):
        part.copy_(torch.arange(part.numel()).view(part.shape) % 100 + number)
        written[key] = part.clone()
    destination.close(components)
    return written


def test_on_a_device_they_stay() -> None:
    for spec in SPECS.values():
        place = OnDevice(CPU)
        written = fill(place, spec)
        assert all(torch.equal(place.components[k], v) for k, v in written.items())


def test_in_a_page_of_a_working_cpu_they_are_the_views() -> None:
    for spec in SPECS.values():
        views = spec.empty("cpu")
        place = InPage(views, CPU)
        assert place.open(spec) is views
        written = fill(place, spec)
        assert all(torch.equal(views[k], v) for k, v in written.items())


def test_on_disk_each_component_is_written_once_from_the_cpu() -> None:
    for spec in SPECS.values():
        got: dict[str, torch.Tensor] = {}
        written = fill(OnDisk(lambda key, part, got=got: got.update({key: part.clone()}), CPU), spec)
        assert list(got) == list(spec.components())
        assert all(torch.equal(got[k], v) and got[k].device == CPU for k, v in written.items())


def test_two_tensors_of_one_spec_share_nothing() -> None:
    first, second = OnDevice(CPU), OnDevice(CPU)
    fill(first, SPECS["plain"])
    kept = first.components[""].clone()
    second.open(SPECS["plain"])[""].zero_()
    assert torch.equal(first.components[""], kept)
