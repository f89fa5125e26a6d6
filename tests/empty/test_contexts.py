from __future__ import annotations

import contextlib
import copy
import pickle
import resource
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from torch import nn, overrides
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tuckaway.empty import init_empty_weights, init_on_device, meta_buffers, rebuild_buffers

# Larger than what is made for real at once
WIDE = 600


class Rotary(nn.Module):
    """Everything a constructor does with tensors that a checkpoint does not bring back."""

    def __init__(self, width: int = WIDE) -> None:
        super().__init__()
        table = torch.zeros(width, width)
        position = torch.arange(width).unsqueeze(1)
        rate = torch.exp(torch.arange(0, width, 2) * (-np.log(10000.0) / width))
        table[:, 0::2] = torch.sin(position * rate)
        table[:, 1::2] = torch.cos(position * rate)
        self.register_buffer("table", table)
        mask = torch.tril(torch.ones(width, width, dtype=torch.bool)).view(1, 1, width, width)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer(
            "inv_freq", 1.0 / (10000 ** (torch.arange(0, 64, 2).float() / 64)), persistent=False
        )
        self.weight = nn.Parameter(torch.randn(width, width) * 0.02)
        self.register_buffer("ones", torch.ones_like(self.weight))
        self.plain = torch.full((width, width), 3.0)
        self.total = self.plain.sum().item()
        self.rates = [x.item() for x in torch.linspace(0, 0.1, 4)]
        self.outside = torch.arange(width * width).numpy()


def devices(model: nn.Module) -> set[str]:
    return {p.device.type for p in model.parameters()}


def assert_same_buffers(model: nn.Module, like: nn.Module) -> None:
    expected = dict(like.named_buffers())
    assert dict(model.named_buffers()).keys() == expected.keys()
    for name, buffer in model.named_buffers():
        assert buffer.device == expected[name].device
        assert buffer.dtype == expected[name].dtype
        assert torch.equal(buffer, expected[name]), name


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(1000, 1000),
        lambda: nn.Linear(3, 4),
        lambda: nn.Conv2d(300, 300, 3),
        lambda: nn.LSTM(300, 300, 2),
        lambda: nn.Embedding(5000, 100, padding_idx=3),
        lambda: nn.MultiheadAttention(512, 8),
        lambda: nn.TransformerEncoderLayer(256, 4),
        lambda: nn.Bilinear(50, 60, 70),
        lambda: nn.BatchNorm1d(70000),
        lambda: nn.ParameterList([torch.ones(3), torch.zeros(400, 400)]),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(400, 400)),
    ],
)
def test_parameters_are_on_meta_and_buffers_real(make):
    with init_empty_weights():
        model = make()
    real = make()
    assert devices(model) == {"meta"}
    assert [(n, p.shape, p.dtype) for n, p in model.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in real.named_parameters()
    ]
    assert_same_buffers(model, real)


def test_every_way_a_constructor_makes_tensors():
    with init_empty_weights():
        model = Rotary()
    real = Rotary()
    assert devices(model) == {"meta"}
    assert_same_buffers(model, real)
    assert torch.equal(model.plain, real.plain)
    assert (model.total, model.rates) == (real.total, real.rates)
    assert (model.outside == real.outside).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda d: nn.Parameter(torch.zeros(d, d)),
        lambda d: nn.Parameter(torch.randn(d, d) * 0.02),
        lambda d: nn.Parameter(torch.Tensor(d, d)),
        lambda d: nn.Parameter(torch.empty(d, d).uniform_(-1, 1)),
        lambda d: nn.Parameter(nn.init.orthogonal_(torch.empty(d, d))),
        lambda d: nn.Parameter(nn.init.trunc_normal_(torch.empty(d, d))),
        lambda d: nn.Parameter(torch.cat([torch.zeros(d, d // 2), torch.ones(d, d - d // 2)], 1)),
        lambda d: nn.Parameter(torch.log(torch.arange(1, d + 1).float().repeat(d, 1))),
        lambda d: nn.Parameter(torch.tensor([[0.5] * d] * d)),
        lambda d: nn.Parameter(torch.from_numpy(np.ones((d, d), np.float32))),
        lambda d: nn.Parameter(torch.eye(d), requires_grad=False),
    ],
)
@pytest.mark.parametrize("width", [5, WIDE])
def test_hand_written_parameters(make, width):
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = make(width)

    with init_empty_weights():
        model = Owner()
    assert model.w.is_meta
    assert type(model.w) is nn.Parameter
    assert model.w.shape == (width, width)
    assert model.w.requires_grad == make(width).requires_grad


def test_huge_parameters_take_no_memory_and_no_time():
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with init_empty_weights():
        layers = nn.Sequential(*[nn.Linear(10_000, 10_000) for _ in range(100)])
        single = nn.Linear(200_000, 200_000)  # 160 GB in one piece
        written = nn.Parameter(torch.randn(100_000, 100_000) * 0.02)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert devices(layers) == devices(single) == {"meta"}
    assert written.is_meta


def test_transformers_llama_of_a_hundred_billion():
    config = LlamaConfig(
        hidden_size=12288,
        intermediate_size=28672,
        num_hidden_layers=60,
        num_attention_heads=96,
        vocab_size=128256,
        max_position_embeddings=131072,
    )
    start = time.process_time()
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    assert time.process_time() - start < 20
    assert sum(p.numel() for p in model.parameters()) > 100e9
    assert devices(model) == {"meta"}
    config.num_hidden_layers, config.vocab_size, config.intermediate_size = 0, 8, 8
    assert torch.equal(model.model.rotary_emb.inv_freq, LlamaForCausalLM(config).model.rotary_emb.inv_freq)


@pytest.mark.parametrize("include_buffers", [False, True])
def test_transformers_gpt2_ties_its_head(include_buffers):
    config = GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=2000)
    with init_empty_weights(include_buffers=include_buffers):
        model = AutoModelForCausalLM.from_config(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert devices(model) == {"meta"}
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert rebuild_buffers(model) == []
    assert_same_buffers(model, GPT2LMHeadModel(config))


def test_ties_are_kept():
    with init_empty_weights():
        a, b = nn.Linear(8, 8), nn.Linear(8, 8)
        b.weight = a.weight
        shared = nn.Parameter(torch.ones(500, 500))
        c, d = nn.Module(), nn.Module()
        c.w, d.w = shared, shared
        listed = [a.weight]
        a.weight = a.weight
    assert b.weight is a.weight is listed[0]
    assert c.w is d.w is shared
    assert shared.is_meta


def test_a_parameter_from_before_is_left_as_it_is():
    real = nn.Linear(4, 4)
    before = real.weight.detach().clone()
    with init_empty_weights():
        model = nn.Linear(4, 4)
        model.weight = real.weight
    assert model.weight is real.weight
    assert torch.equal(real.weight, before)
    assert model.bias.is_meta


def test_custom_parameters_keep_class_and_attributes():
    class Marked(nn.Parameter):
        def __new__(cls, data, mark):
            self = torch.Tensor._make_subclass(cls, data)
            self.mark = mark
            return self

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = Marked(torch.ones(3), mark="here")
            self.v = Marked(torch.ones(WIDE, WIDE), mark="there")
            self.register_parameter("none", None)
            self.w._no_weight_decay = True

    with init_empty_weights():
        model = Owner()
    assert (type(model.w), model.w.mark, model.w._no_weight_decay) == (Marked, "here", True)
    assert (type(model.v), model.v.mark) == (Marked, "there")
    assert devices(model) == {"meta"}
    assert model.none is None


def test_devices_named_by_the_model():
    with init_empty_weights():
        explicit = nn.Linear(600, 600, device="cpu")
        asked_for = nn.Linear(600, 600, device="meta")
        with torch.device("meta"):
            table = torch.arange(100)
    assert devices(explicit) == devices(asked_for) == {"meta"}
    assert table.is_meta


def test_include_buffers_and_rebuild():
    real = Rotary()
    with init_empty_weights(include_buffers=True):
        model = Rotary()
    assert meta_buffers(model) == ["table", "mask", "inv_freq", "ones"]
    assert meta_buffers(model, persistent=False) == ["mask", "inv_freq"]
    assert model.total == real.total
    assert rebuild_buffers(model) == []
    assert meta_buffers(model) == ["table", "ones"]
    assert torch.equal(model.mask, real.mask)
    assert torch.equal(model.inv_freq, real.inv_freq)


def test_rebuild_names_what_it_cannot_know():
    model = nn.Sequential(nn.Module())
    model[0].register_buffer("x", torch.empty(3, device="meta"), persistent=False)
    assert rebuild_buffers(model) == ["0.x"]


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_environment_says_whether_buffers_go_along(monkeypatch, value, expected):
    monkeypatch.setenv("ACCELERATE_INIT_INCLUDE_BUFFERS", value)
    with init_empty_weights():
        model = nn.BatchNorm1d(4)
    assert model.running_mean.is_meta == expected
    with init_empty_weights(include_buffers=not expected):
        model = nn.BatchNorm1d(4)
    assert model.running_mean.is_meta != expected


def test_nested_contexts():
    with init_empty_weights():
        outer = nn.BatchNorm1d(4)
        with init_on_device("cpu"):
            real = nn.Linear(WIDE, WIDE)
        with init_empty_weights(include_buffers=True):
            inner = nn.BatchNorm1d(4)
        after = Rotary()
    assert devices(outer) == devices(inner) == devices(after) == {"meta"}
    assert devices(real) == {"cpu"}
    assert inner.running_mean.is_meta
    assert not outer.running_mean.is_meta
    assert_same_buffers(after, Rotary())


def test_init_on_device():
    with init_on_device("meta"):
        assert nn.Linear(3, 3).weight.is_meta
    with init_on_device(torch.device("cpu"), include_buffers=True):
        model = nn.BatchNorm1d(4)
    assert devices(model) == {"cpu"}
    assert torch.equal(model.weight, torch.ones(4))


def test_usable_as_a_decorator():
    @init_empty_weights()
    def build() -> nn.Module:
        return nn.Linear(3, 3)

    assert build().weight.is_meta
    assert build().weight.is_meta


def test_nothing_is_left_behind_even_by_an_exception():
    register = nn.Module.register_parameter
    with pytest.raises(ZeroDivisionError), init_empty_weights():  # noqa: PT012
        with init_empty_weights(include_buffers=True):
            nn.Linear(3, 3)
        assert nn.Module.register_parameter is register
        raise ZeroDivisionError
    assert not nn.Linear(3, 3).weight.is_meta
    assert not nn.Linear(3000, 3000).weight.is_meta
    assert not torch.nn.modules.module._global_parameter_registration_hooks
    assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0


def _build_and_lose_the_mode():
    with init_empty_weights():
        nn.Linear(4, 4)
        overrides._pop_mode()
        raise KeyboardInterrupt


@pytest.mark.parametrize("outer", [False, True])
def test_an_interrupt_that_loses_a_mode_is_still_an_interrupt(outer):
    """``nn.init`` pops the innermost function mode for the length of a call: an interrupt can lose it."""
    with torch.device("cpu") if outer else contextlib.nullcontext():
        before = overrides._get_current_function_mode_stack()
        with pytest.raises(KeyboardInterrupt):
            _build_and_lose_the_mode()
        assert overrides._get_current_function_mode_stack() == before
        assert not nn.Linear(300, 300).weight.is_meta


def test_modes_that_an_interrupt_left_behind_are_taken_away():
    with init_empty_weights():
        inner = overrides._get_current_function_mode_stack()[-1]
        overrides._push_mode(inner)
    assert not overrides._get_current_function_mode_stack()
    assert not nn.Linear(300, 300).weight.is_meta


def test_a_mode_of_operations_that_an_interrupt_left_behind_is_taken_away():
    with init_empty_weights():
        torch._C._push_on_torch_dispatch_stack(_get_current_dispatch_mode_stack()[-1])
    assert not _get_current_dispatch_mode_stack()
    assert not nn.Linear(300, 300).weight.is_meta


def test_other_threads_are_unaffected():
    entered, done, results = threading.Event(), threading.Event(), []

    def elsewhere() -> None:
        entered.wait()
        for _ in range(20):
            results.append(nn.Linear(300, 300))
        done.set()

    def empty() -> None:
        with init_empty_weights():
            results.append(nn.Linear(300, 300))

    thread = threading.Thread(target=elsewhere)
    others = [threading.Thread(target=empty) for _ in range(4)]
    thread.start()
    with init_empty_weights():
        entered.set()
        mine = [nn.Linear(300, 300) for _ in range(20)]
        for other in others:
            other.start()
        done.wait()
    for each in (thread, *others):
        each.join()
    assert all(m.weight.is_meta for m in mine)
    assert [m.weight.is_meta for m in results].count(True) == len(others)
    assert len(results) == 24


def test_a_parameter_that_others_refer_to_weakly_is_reported(caplog):
    kept = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            p = nn.Parameter(torch.ones(3))
            kept.append(weakref.ref(p))
            self.p = p

    with init_empty_weights():
        model = Watched()
    assert not model.p.is_meta
    assert "stays real" in caplog.text


def test_empty_models_copy_and_pickle():
    with init_empty_weights(include_buffers=True):
        model = Rotary()
    again = copy.deepcopy(model)
    assert devices(again) == {"meta"}
    assert pickle.loads(pickle.dumps(nn.ModuleList([model])))[0].weight.is_meta


def test_lazy_modules_stay_lazy():
    with init_empty_weights():
        model = nn.LazyLinear(3)
    assert nn.parameter.is_lazy(model.weight)


def test_copying_a_model_inside():
    with init_empty_weights():
        layer = nn.TransformerEncoderLayer(256, 4, batch_first=True)
        model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        model.half()
    assert devices(model) == {"meta"}
    assert len({id(p) for p in model.parameters()}) == 3 * len(list(layer.parameters()))
    assert next(model.parameters()).dtype == torch.float16
