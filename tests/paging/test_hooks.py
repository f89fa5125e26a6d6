"""What accelerate, transformers, peft and the compiler see of a paged model."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module, remove_hook_from_submodules
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn

from paging_models import make, page, quantize_linears, tokens
from tuckaway.config import QuantizationConfig
from tuckaway.errors import PagingError, StoreBusy
from tuckaway.paging import PageHook, paging_of
from tuckaway.tensor import QuantizedTensor


@pytest.fixture
def model(tmp_path):
    return page(make(), {"": "disk", "blocks.1": "cpu"}, tmp_path)


@pytest.fixture
def want():
    with torch.no_grad():
        return make()(tokens())


def test_accelerate_sees_offloaded_modules(model):
    for module in (model, model.embedding, model.blocks[0], model.blocks[1].up, model.head):
        assert isinstance(module._hf_hook, AlignDevicesHook)
        assert has_offloaded_params(module)
    assert not has_offloaded_params(model.blocks)
    assert model._hf_hook.io_same_device
    assert not model.blocks[0]._hf_hook.io_same_device
    assert str(model.blocks[0]._hf_hook.execution_device) == "cpu"


def test_only_modules_with_pages_are_driven(model):
    driven = {name for name, m in model.named_modules() if getattr(m, "_hf_hook", None) and m._hf_hook.driven}
    assert driven == {"", "embedding", "norm", "head", *(f"blocks.{i}" for i in range(5))}
    assert not model.blocks[0].up._forward_hooks


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu"), "meta"])
@pytest.mark.parametrize("path", ["blocks.0.up", "blocks.1", "blocks.1.norm", "head"])
def test_align_module_device_brings_one_module_in(model, path, device, want):
    module, resident = model.get_submodule(path), make().get_submodule(path)
    before = dict(module.named_parameters())
    for _ in range(2):
        with align_module_device(module, device):
            for name, parameter in module.named_parameters():
                if device == "meta" and "." not in name:
                    assert parameter.is_meta
                elif device != "meta":
                    assert torch.equal(parameter, resident.get_parameter(name))
        for name, parameter in module.named_parameters():
            assert parameter is before[name]
            assert parameter.is_meta
    with torch.no_grad():
        assert torch.equal(model(tokens()), want)


def test_align_module_device_lets_go_after_an_error(model, want):
    with pytest.raises(KeyError), align_module_device(model.blocks[0].up):
        raise KeyError
    assert model.blocks[0].up.weight.is_meta
    with torch.no_grad():
        assert torch.equal(model(tokens()), want)


def test_a_module_that_asks_during_its_blocks_turn(model, want):
    block = model.blocks[2]
    seen = []

    def ask(module, args, output):
        with align_module_device(block.down):
            seen.append(block.down.weight.is_meta)
        seen.append(block.down.weight.is_meta)

    block.norm.register_forward_hook(ask)
    with torch.no_grad():
        assert torch.equal(model(tokens()), want)
    assert seen == [False, False]
    assert block.down.weight.is_meta


def test_weights_map_reads_the_homes(model):
    resident = make()
    weights = model._hf_hook.weights_map
    assert set(weights) == set(dict(resident.named_parameters(remove_duplicate=False)))
    assert len(weights) == len(list(weights))
    assert torch.equal(weights["blocks.1.up.weight"], resident.blocks[1].up.weight)
    assert torch.equal(model.blocks[0]._hf_hook.weights_map["up.bias"], resident.blocks[0].up.bias)
    assert torch.equal(model.head._hf_hook.weights_map["weight"], resident.head.weight)
    with pytest.raises(KeyError):
        weights["blocks.0.scale"]


def test_transformers_finds_an_offloaded_parameter(tmp_path):
    from transformers.integrations.accelerate import load_offloaded_parameter

    model = page(quantize_linears(make(), QuantizationConfig(compute_dtype=None)), {"": "disk"}, tmp_path)
    resident = quantize_linears(make(), QuantizationConfig(compute_dtype=None))
    found = load_offloaded_parameter(model, "blocks.0.up.weight")
    assert isinstance(found, QuantizedTensor)
    assert torch.equal(found.dequantize(), resident.blocks[0].up.weight.dequantize())
    assert torch.equal(load_offloaded_parameter(model, "position"), resident.position)


@pytest.mark.parametrize("remove", ["all", "below", "one block", "one layer"])
def test_accelerate_removes_hooks(model, want, remove):
    if remove == "all":
        remove_hook_from_module(model, recurse=True)
    elif remove == "below":
        remove_hook_from_submodules(model)
    else:
        part = model.blocks[0] if remove == "one block" else model.blocks[0].up
        remove_hook_from_module(part, recurse=True)
        assert not any(p.is_meta for p in model.blocks[0].parameters())
        assert model.blocks[2].up.weight.is_meta
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(tokens()), want)
    assert (paging_of(model) is None) == (remove == "all" or remove == "below")
    if paging_of(model) is None:
        assert not any(p.is_meta for p in model.parameters())
        assert model.head.weight is model.embedding.weight
        model.to(torch.float64)


def test_hooks_of_others_see_the_weights(model):
    seen = []
    for module in (model.blocks[0], model.head):
        module.register_forward_pre_hook(lambda m, *_: seen.append(any(p.is_meta for p in m.parameters())))
    with torch.no_grad():
        model(tokens())
    assert seen == [False, False]


class Echo(nn.Module):
    """Returns what it was given and keeps it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x, *, cache=None, mask=None):
        self.got = (x, cache, mask)
        return {"x": x, "cache": cache}


def test_inputs_are_moved_and_outputs_brought_back(tmp_path, monkeypatch):
    model = page(make(Echo), {"": "disk"}, tmp_path, skip_keys="cache")
    monkeypatch.setattr(model._hf_hook, "_device", torch.device("meta"))
    real = torch.ones(2)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):  # on its way back to the CPU
        model(real, cache=real, mask=[real])
    x, cache, mask = model.got
    assert x.is_meta
    assert cache is real
    assert mask[0].is_meta
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        page(make(Echo), {"": "cpu"})(torch.ones(2, device="meta"))  # on its way in


def test_skip_keys_stay_everywhere(tmp_path):
    model = page(make(Echo), {"": "disk"}, tmp_path, skip_keys=["cache", "mask"])
    away = torch.ones(2, device="meta")
    out = model(torch.ones(2), cache=away, mask=away)
    assert model.got[1] is away
    assert out["cache"] is away


def test_it_compiles_around_the_hooks(model, want):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(tokens()), want)
            assert torch.equal(model(tokens()), want)


def test_a_generating_model(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def build():
        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=4, n_embd=32, n_head=2, vocab_size=64, n_positions=64, bos_token_id=0, eos_token_id=63
        )
        return GPT2LMHeadModel(config).eval().requires_grad_(False)

    resident, model = build(), page(build(), {"": "disk", "transformer.h.1": "cpu"}, tmp_path)
    model.hf_device_map = {"": "disk", "transformer.h.1": "cpu"}
    prompt = torch.tensor([[1, 2, 3]])
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        args = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 63, **options}
        assert torch.equal(model.generate(prompt, **args), resident.generate(prompt, **args)), options
    assert all(p.is_meta for p in model.parameters())


def test_an_adapter_on_a_paged_model(tmp_path):
    from peft import LoraConfig, get_peft_model

    def build():
        torch.manual_seed(1)
        return get_peft_model(make(), LoraConfig(r=2, target_modules=["up"]))

    resident = build()
    model = page(build(), {"": "disk"}, tmp_path, leave=lambda name: "lora_" in name)
    for _ in range(2):
        losses = []
        for adapted in (resident, model):
            optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
            loss = adapted(tokens()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        assert torch.isfinite(losses[0])
        assert torch.equal(*losses)
    for (name, a), (_, b) in zip(resident.named_parameters(), model.named_parameters(), strict=True):
        assert not a.requires_grad or torch.equal(a, b), name


@pytest.mark.parametrize("home", ["disk", "cpu"])
@pytest.mark.parametrize("format", [None, "nf4"])
def test_an_adapter_is_merged_into_paged_weights(tmp_path, home, format):
    from peft import LoraConfig, get_peft_model

    def build():
        model = make()
        if format:
            quantize_linears(model, QuantizationConfig(format=format, nested=False, compute_dtype=None))
        return get_peft_model(model, LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))

    resident = build()
    model = page(build(), {"": home}, tmp_path, leave=lambda name: "lora_" in name)
    with torch.no_grad():
        model(tokens())
        resident, model = resident.merge_and_unload(), model.merge_and_unload()
        for _ in range(2):
            assert torch.equal(model(tokens()), resident(tokens()))
    assert model.blocks[0].up.weight.is_meta
    assert not (tmp_path / "manifest.json").exists()


def test_a_weight_is_replaced_in_its_home(model, tmp_path):
    resident = make()
    with torch.no_grad():
        model(tokens())
        for index in (0, 1):  # on disk and in memory
            value = torch.randn(resident.blocks[index].up.weight.shape)
            resident.blocks[index].up.weight.copy_(value)
            model.blocks[index]._hf_hook.weights_map["up.weight"] = value.double()
        for _ in range(2):
            assert torch.equal(model(tokens()), resident(tokens()))
    with pytest.raises(PagingError, match="cannot be replaced"):
        model.norm._hf_hook.weights_map["weight"] = torch.ones(3)
    with pytest.raises(PagingError, match="cannot be removed"):
        del model.norm._hf_hook.weights_map["weight"]
    assert not (tmp_path / "manifest.json").exists()
    paging_of(model).close()
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_others_use_is_not_changed(tmp_path, want):
    models = [page(make(), {"": "disk"}, tmp_path, fingerprint="m") for _ in range(2)]
    with pytest.raises(StoreBusy):
        models[0].norm._hf_hook.weights_map["weight"] = torch.ones(32)
    with torch.no_grad():
        for model in models:
            assert torch.equal(model(tokens()), want)


def test_what_is_written_to_weights_brought_in_by_hand_is_not_kept(model, want):
    with torch.no_grad():
        model(tokens())
        with align_module_device(model.blocks[4].up):
            model.blocks[4].up.weight.zero_()
        assert torch.equal(model(tokens()), want)


def test_the_hook_is_what_it_says(model):
    hook = model.blocks[0]._hf_hook
    assert isinstance(hook, PageHook)
    assert hook.offload
    assert "AlignDevicesHook" in repr(hook)
    assert hook.init_hook(model.blocks[0]) is model.blocks[0]
