"""Paging to any device: every result is the resident model's, bit for bit.

The same tests run on a CPU and on a GPU. What only a GPU has, streams, pinned memory and graphs, is in
``tests/gpu/test_paging.py``.
"""

from __future__ import annotations

import pytest
import torch

from paging_models import WIDE, maps, page, tokens, wide_net
from tuckaway.paging import materialize, paging_of
from tuckaway.tensor import QuantizedTensor

FORMATS = (None, "nf4", "fp4", "int8")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(params=["cpu", "disk", "mixed"])
def home(request):
    return request.param


def paged(folder, device, home, format=None, **options):
    main = 0 if device == "cuda" else "cpu"
    return page(wide_net(format, device), maps(main)[home], folder, execution_device=main, **options)


@pytest.mark.parametrize("format", FORMATS)
def test_logits_are_the_resident_models(tmp_path, device, home, format):
    resident, model = wide_net(format, device).to(device), paged(tmp_path, device, home, format)
    with torch.no_grad():
        for seed in range(4):
            x = tokens(seed).to(device)
            assert torch.equal(model(x), resident(x))
            assert model(tokens(seed)).device.type == "cpu"  # back to where the input was
    for name, parameter in model.named_parameters():
        if paging_of(model).plan.page_of(name) is not None:
            assert parameter.is_meta, name


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_hundreds_of_turns_never_mix_pages(tmp_path, device, home, slots):
    """Nothing waits for the device in between, so every slot is overwritten while it could still be read."""
    resident, model = wide_net().to(device), paged(tmp_path, device, home, slots=slots)
    x = tokens().to(device)
    orders = [None, [7, 6, 5, 4, 3, 2, 1, 0], [0, 0, 3, 0], [2, 5], None]
    with torch.no_grad():
        wants = []
        for order in orders:
            resident.order = order
            wants.append(resident(x))
        results = []
        for round in range(25):
            for order, want in zip(orders, wants, strict=True):
                model.order = order
                results.append((model(x), want, round, order))
    if device == "cuda":
        torch.accelerator.synchronize()
    for got, want, round, order in results:
        assert torch.equal(got, want), (round, order)


@pytest.mark.parametrize("format", [None, "nf4", "int8"])
def test_training_through_paged_weights(tmp_path, device, home, format):
    def gradients(model):
        results = []
        for seed in range(3):
            x = torch.randn(4, WIDE, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)
            x.requires_grad_()
            y = x
            for block in model.blocks:
                y = block(y)
            y.float().square().mean().backward()
            results.append(x.grad)
        return results

    resident, model = wide_net(format, device).to(device), paged(tmp_path, device, home, format)
    for got, want in zip(gradients(model), gradients(resident), strict=True):
        assert torch.equal(got, want)


def test_a_frozen_paged_model_is_checkpointed(tmp_path, device, home):
    from torch.utils.checkpoint import checkpoint

    def gradient(model, reentrant):
        x = torch.ones(4, WIDE, device=device, dtype=torch.bfloat16, requires_grad=True)
        y = x
        for block in model.blocks:
            y = checkpoint(block, y, use_reentrant=reentrant)
        y.float().sum().backward()
        return x.grad

    resident, model = wide_net().to(device), paged(tmp_path, device, home)
    for reentrant in (False, True):
        assert torch.equal(gradient(model, reentrant), gradient(resident, reentrant))


@pytest.mark.parametrize("format", [None, "nf4"])
def test_materialize(tmp_path, device, home, format):
    resident, model = wide_net(format, device).to(device), paged(tmp_path, device, home, format)
    x = tokens().to(device)
    with torch.no_grad():
        model(x)
        assert materialize(model) is model
        assert all(p.device.type == device for p in model.parameters())
        assert isinstance(model.blocks[0].up.weight, QuantizedTensor) == (format is not None)
        assert torch.equal(model(x), resident(x))
        model.to("cpu")


def test_weights_are_aligned_elsewhere(tmp_path, device):
    from accelerate.utils import align_module_device

    model, resident = paged(tmp_path, device, "disk"), wide_net()
    with align_module_device(model.blocks[2].up, "cpu"):
        assert torch.equal(model.blocks[2].up.weight, resident.blocks[2].up.weight)
    with align_module_device(model.blocks[2].up):
        assert model.blocks[2].up.weight.device.type == device
        assert torch.equal(model.blocks[2].up.weight.cpu(), resident.blocks[2].up.weight)
    assert model.blocks[2].up.weight.is_meta
