"""What a model's classes keep precise is not quantized, and fp32 where they say so, whosever class it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tuckaway
from tuckaway import QuantizationConfig
from tuckaway.plan import choose_specs
from tuckaway.plan.declared import declared_precise


class Part(nn.Module):
    _keep_in_fp32_modules = ("wo",)
    _keep_in_fp32_modules_strict = "gate.weight"

    def __init__(self) -> None:
        super().__init__()
        self.wo, self.wo_not, self.gate = (nn.Linear(64, 64) for _ in range(3))
        self.register_buffer("gate_shift", torch.zeros(64))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Part()
        self.wo = nn.Linear(64, 64)
        self.last = nn.ReLU()


def chosen(**options: object) -> tuple[dict[str, str], dict[str, torch.dtype]]:
    specs, reasons = choose_specs(Whole(), QuantizationConfig("nf4", **options))
    return reasons, {name: spec.dtype for name, spec in specs.items()}


def test_what_a_class_names_is_left_alone_below_it() -> None:
    reasons, _ = chosen()
    assert reasons["part.wo.weight"] == "kept precise by its class (_keep_in_fp32_modules)"
    assert reasons["part.gate.weight"] == "kept precise by its class (_keep_in_fp32_modules_strict)"
    assert not reasons.keys() & {"wo.weight", "part.wo_not.weight"}


@pytest.mark.parametrize(
    ("dtype", "soft", "strict"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
)
def test_fp32_beside_halves(dtype: torch.dtype, soft: torch.dtype, strict: torch.dtype) -> None:
    _, dtypes = chosen(dtype=dtype)
    assert dtypes["part.wo.bias"] == soft
    assert dtypes["part.gate.weight"] == strict
    assert dtypes["part.gate.bias"] == dtypes["wo.bias"] == dtype


def test_who_names_it_has_it_quantized() -> None:
    reasons, dtypes = chosen(formats={"part.wo": "int8"}, dtype=torch.float16)
    assert "part.wo.weight" not in reasons
    assert dtypes["part.wo.weight"] == torch.float16
    reasons, _ = chosen(formats={"part.w*": "int8"})
    assert "by its class" in reasons["part.wo.weight"]


def test_what_the_user_says_comes_first() -> None:
    reasons, dtypes = chosen(skip_modules=["part"], keep_in_fp32_modules=["gate"], dtype=torch.bfloat16)
    assert reasons["part.wo.weight"] == "skipped: 'part'"
    assert dtypes["part.gate.bias"] == torch.float32


def test_patterns_are_regular_expressions_and_globs() -> None:
    class Odd(nn.Module):
        _keep_in_fp32_modules = ("a.*.b", "x[yz]", "open(")

    names = ["a.0.b.weight", "a.0.bbc.weight", "h.xz", "h.xzz", "open(.w"]
    assert set(declared_precise(Odd(), names, None)) == {"a.0.b.weight", "h.xz", "open(.w"}
    # a dtype is chosen by what is found anywhere in a name, as transformers does
    assert set(declared_precise(Odd(), names, torch.float16)) == set(names)


class SoftRouter(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(64, 64) for _ in range(depth)])


@pytest.mark.parametrize(("depth", "left"), [(1, True), (4, True), (5, False)])
def test_layers_of_a_router(depth: int, left: bool) -> None:
    model = nn.Sequential(SoftRouter(depth), nn.Linear(64, 64), nn.ReLU())
    _, reasons = choose_specs(model, QuantizationConfig("nf4"))
    assert (reasons.get("0.layers.0.weight") == "a router") == left
    assert "1.weight" not in reasons
    _, reasons = choose_specs(model, QuantizationConfig("nf4", only_modules=["0.layers.0"]))
    assert "0.layers.0.weight" not in reasons


def test_a_model_that_is_a_router() -> None:
    _, reasons = choose_specs(SoftRouter(2), tuckaway.QuantizationConfig("nf4", quantize_head=True))
    assert "layers.0.weight" not in reasons
