from __future__ import annotations

from types import SimpleNamespace

import accelerate.utils.modeling as theirs
import pytest
import torch
from accelerate.utils.dataclasses import CustomDtype
from torch import nn

from tuckaway.config import QuantizationConfig
from tuckaway.empty import init_empty_weights
from tuckaway.errors import PlanError
from tuckaway.plan import choose_specs, compute_module_sizes, memory_footprint, tensor_sizes
from tuckaway.plan.sizes import dtype_byte_size
from tuckaway.tensor import TensorSpec, quantize


def small_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5)))
    model.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
    return model


@pytest.mark.parametrize("dtype", [None, torch.float16, "bfloat16", torch.float32])
@pytest.mark.parametrize("buffers_only", [False, True])
@pytest.mark.parametrize("special", [None, {"0.weight": torch.float16, "2.1.weight": CustomDtype.INT4}])
def test_module_sizes_are_accelerates(dtype, buffers_only, special):
    model = small_model()
    expected = theirs.compute_module_sizes(model, dtype, special, buffers_only)
    found = compute_module_sizes(model, dtype, special, buffers_only)
    assert found == {name: int(size) for name, size in expected.items()}


def test_module_sizes_on_meta():
    with init_empty_weights():
        model = small_model()
    assert compute_module_sizes(model) == compute_module_sizes(small_model())


def test_tied_tensors_count_once_in_every_module_that_has_them():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Sequential(nn.Linear(8, 8, bias=False)))
    model[1][0].weight = model[0].weight
    sizes = compute_module_sizes(model)
    assert sizes[""] == sizes["0"] == sizes["1"] == sizes["1.0.weight"] == 256


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # codes, one byte a scale, a scale of those, their mean
        (QuantizationConfig(skip_modules=[]), 64 * 128 // 2 + 128 + 4 + 4),
        (QuantizationConfig(skip_modules=[], nested=False), 64 * 128 // 2 + 128 * 4),
        (QuantizationConfig(skip_modules=[], nested=False, blocksize=256), 64 * 128 // 2 + 32 * 4),
        (QuantizationConfig(skip_modules=[], format="int8"), 64 * 128 + 64 * 4),
    ],
)
def test_specs_give_the_bytes_that_quantizing_takes(config, expected):
    model = nn.Linear(128, 64, bias=False)
    specs, _ = choose_specs(model, config)
    assert compute_module_sizes(model, specs=specs) == {"": expected, "weight": expected}
    assert quantize(model.weight, config).nbytes == expected


def test_tensor_sizes_name_aliases():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert tensor_sizes(model) == {"0.weight": 64, "0.bias": 16, "1.weight": 64, "1.bias": 16}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bool, 1),
        (torch.float8_e4m3fn, 1),
        (CustomDtype.INT2, 0.25),
        (CustomDtype.FP8, 1),
        ("torch.int64", 8),
    ],
)
def test_dtype_byte_size(dtype, expected):
    assert dtype_byte_size(dtype) == expected


@pytest.mark.parametrize("dtype", ["float17", None, "nn"])
def test_dtype_byte_size_refuses(dtype):
    with pytest.raises(PlanError, match="is no dtype"):
        dtype_byte_size(dtype)


def test_footprint_counts_each_memory_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(4))
    plain = 256 + 256 + 4 * 16 + 8
    assert memory_footprint(model) == plain
    model[1].weight = model[0].weight
    assert memory_footprint(model) == plain - 256
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert memory_footprint(model) == plain - 256
    assert memory_footprint(model, by_device=True) == {"cpu": plain - 256}


def test_footprint_of_quantized_and_empty_weights():
    model = nn.Linear(128, 64, bias=False)
    model.weight = nn.Parameter(quantize(model.weight, "int8"), requires_grad=False)
    assert memory_footprint(model) == 64 * 128 + 64 * 4
    with init_empty_weights():
        empty = nn.Linear(128, 64)
    assert memory_footprint(empty) == 0
    assert memory_footprint(empty, by_device=True) == {}


def test_footprint_of_paged_weights_is_where_they_are_paged_from():
    with init_empty_weights():
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
        model[1].weight = model[0].weight
    model[0].bias = nn.Parameter(torch.ones(8))
    spec = TensorSpec((8, 8), torch.bfloat16)
    plan = SimpleNamespace(
        specs={"0.weight": spec},
        canonical={"0.weight": "0.weight", "1.weight": "0.weight", "0.bias": "0.bias"},
        pages=[SimpleNamespace(home="disk", tensors=("0.weight",))],
    )
    model._tuckaway_paging = SimpleNamespace(plan=plan)
    assert memory_footprint(model, by_device=True) == {"disk": 128, "cpu": 32}
