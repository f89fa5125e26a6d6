"""Tensors that are used while their page is out: fetched for that use, never written to, never meta in a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tuckaway
from tuckaway.errors import PagingError

CONFIG = tuckaway.QuantizationConfig(compute_dtype=torch.float32, skip_modules=[])


class Reaching(nn.Module):
    """A model that uses weights of modules it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 64)
        self.first = nn.Linear(64, 64)
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(2)])
        self.norm = nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.table.weight.device)
        x = F.linear(x, self.first.weight, self.first.bias) + self.table.weight[3]
        for layer in self.layers:
            x = x + x @ layer.weight.t()
        return x * self.norm.weight + torch.stack([p.sum() for p in self.norm.parameters()]).sum()


@pytest.fixture
def models(tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    """The same weights, resident and paged."""
    torch.manual_seed(0)
    resident = tuckaway.load_and_quantize_model(Reaching(), CONFIG, device_map={"": "cpu"})
    tuckaway.save_model(resident, tmp_path / "checkpoint")
    with tuckaway.init_empty_weights():
        paged: nn.Module = Reaching()
    placement: Any = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "pages"}
    return resident, tuckaway.load_and_quantize_model(paged, CONFIG, tmp_path / "checkpoint", **placement)


def test_weights_of_modules_that_are_never_called(models: tuple[nn.Module, nn.Module]) -> None:
    resident, paged = models
    x = torch.randn(5, 64)
    assert torch.equal(resident(x), paged(x))
    assert all(p.is_meta and p.device.type == "meta" for p in paged.parameters())


def test_looking_at_a_weight(models: tuple[nn.Module, nn.Module]) -> None:
    resident, paged = models
    for name, away in paged.named_parameters():
        here = resident.get_parameter(name)
        assert isinstance(away, nn.Parameter)
        assert isinstance(away, tuckaway.QuantizedTensor) == isinstance(here, tuckaway.QuantizedTensor)
        assert (away.shape, away.dtype, away.numel()) == (here.shape, here.dtype, here.numel())
        assert torch.equal(away.cpu() + 0, here + 0)
        assert away.to("meta").is_meta
    weight = paged.first.weight
    for view in (weight.T, weight.mT, weight.data.t(), weight.detach().t()):
        assert torch.equal(view @ torch.eye(64), resident.first.weight.t() @ torch.eye(64))
    assert weight.detach().is_meta
    assert weight.type() == "torch.meta.FloatTensor"
    assert torch.equal(weight.dequantize(), resident.first.weight.dequantize())


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.div_(2),
        lambda p: p.copy_(torch.zeros(64, 64)),
        lambda p: nn.init.zeros_(p),
        lambda p: p.__setitem__(0, 1.0),
        lambda p: p.__imul__(2),
        lambda p: p.data.mul_(2),
        lambda p: p.detach().zero_(),
    ],
)
def test_writing_would_be_lost(models: tuple[nn.Module, nn.Module], write: Any) -> None:
    _, paged = models
    with torch.no_grad(), pytest.raises(PagingError, match=r"'first.weight' is paged out"):
        write(paged.first.weight)


def test_a_gradient_would_be_lost(models: tuple[nn.Module, nn.Module]) -> None:
    _, paged = models
    with pytest.raises(PagingError, match="would lose its gradient"):
        (paged.norm.weight * 2).sum().backward()


def test_functional_call(models: tuple[nn.Module, nn.Module]) -> None:
    resident, paged = models
    x, bias = torch.randn(5, 64), torch.ones(64)
    change = {"first.bias": bias}
    assert torch.equal(
        torch.func.functional_call(paged, change, x), torch.func.functional_call(resident, change, x)
    )


def test_a_model_that_is_gone(models: tuple[nn.Module, nn.Module]) -> None:
    weight = models[1].first.weight
    tuckaway.materialize(models[1])
    del models
    assert weight.is_meta


def test_a_cast_waits_until_values_are_asked_for(models: tuple[nn.Module, nn.Module]) -> None:
    resident, paged = models
    for name in ("norm.weight", "first.weight"):
        here, away = resident.get_parameter(name), paged.get_parameter(name)
        for cast in (away.to(torch.bfloat16), away.data.bfloat16()):
            assert torch.equal(cast + 0.0, here.to(torch.bfloat16) + 0.0)
        assert away.to(torch.float16).is_meta
        assert away.half().dtype is torch.float16


def test_setting_data_replaces_the_page(models: tuple[nn.Module, nn.Module]) -> None:
    _, paged = models
    x = torch.randn(2, 64)
    before = paged(x)
    for parameter in paged.parameters():
        parameter.data = parameter.data.to(torch.float64)  # as peft's prepare_model_for_kbit_training does
    assert torch.equal(paged(x), before)
    paged.norm.weight.data = torch.zeros(64)  # type: ignore[union-attr]
    assert not torch.equal(paged(x), before)
    with pytest.raises(PagingError, match=r"norm\.weight"):
        paged.norm.weight.data = torch.zeros(3)  # type: ignore[union-attr]


# the compiler itself looks at tensors that it goes on with
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(models: tuple[nn.Module, nn.Module], backend: str) -> None:
    """Graphs end where bytes are read, and go on behind it: outputs, and gradients of what comes in, are the same."""
    resident, paged = models
    torch._dynamo.reset()
    compiled = torch.compile(paged.requires_grad_(False), backend=backend)
    x = torch.randn(5, 64)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(x), resident(x))
    slopes = []
    for model in (compiled, resident):
        leaf = x.clone().requires_grad_()
        model(leaf).sum().backward()
        slopes.append(leaf.grad)
    torch.testing.assert_close(slopes[0], slopes[1])
    assert all(p.is_meta for p in paged.parameters())
    torch._dynamo.reset()


def test_no_graph_is_the_whole_of_a_paged_model(models: tuple[nn.Module, nn.Module]) -> None:
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(models[1], backend="eager", fullgraph=True)(torch.randn(5, 64))
    torch._dynamo.reset()


def test_frozen_once_it_is_paged(models: tuple[nn.Module, nn.Module]) -> None:
    x = torch.randn(5, 64, requires_grad=True)
    with pytest.raises(PagingError, match="would lose its gradient"):
        models[1](x).sum().backward()
    models[1].requires_grad_(False)(x).sum().backward()
    assert x.grad is not None
