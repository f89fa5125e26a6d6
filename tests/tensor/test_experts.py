"""Stacks of experts, quantized: every way of using one decodes the experts in use, and no others.

The definition is the same operation on the dequantized stack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

import tuckaway
from loading import quantized_names
from tuckaway import QuantizationConfig, QuantizedTensor, quantize

CONFIGS = {
    "nf4": QuantizationConfig("nf4", nested=False, compute_dtype=None),
    "nf4-nested": QuantizationConfig("nf4", compute_dtype=None),
    "fp4-32": QuantizationConfig("fp4", blocksize=32, compute_dtype=None),
    "int8": QuantizationConfig("int8", int8_threshold=None, compute_dtype=None),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> QuantizationConfig:
    return CONFIGS[request.param]


def ends(*counts: int) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


OPERATIONS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "grouped_mm": lambda w, x: F.grouped_mm(x, w.transpose(-2, -1), offs=ends(5, 0, 3, 4)),
    "grouped_mm, not transposed": lambda w, x: F.grouped_mm(x @ x.t() @ x[:, :64], w, offs=ends(1, 11, 0, 0)),
    "torch._grouped_mm": lambda w, x: torch._grouped_mm(x, w.mT, offs=ends(12, 0, 0, 0)),
    "select": lambda w, x: F.linear(x, w[2]) + x @ w[-1].t(),
    "select by tensor": lambda w, x: F.linear(x, w[torch.tensor(1)]),
    "index and bmm": lambda w, x: torch.bmm(w[torch.tensor([3, 1, 3])], x[:3].unsqueeze(-1)),
    "bmm from the left": lambda w, x: torch.bmm(x.view(3, 4, -1), w[torch.tensor([0, 2, 2])].transpose(1, 2)),
    "bmm with all": lambda w, x: torch.bmm(x.view(4, 3, -1), w.mT),
    "baddbmm": lambda w, x: torch.baddbmm(torch.ones(4, 3, 64), x.view(4, 3, -1), w.mT, beta=2, alpha=0.5),
    "matmul": lambda w, x: x.view(4, 3, -1) @ w.mT,
    "einsum": lambda w, x: torch.einsum("bk,enk->ben", x, w),
    "unbind": lambda w, x: torch.stack([x @ e.t() for e in w]),
    "index of two dimensions": lambda w, x: w[torch.tensor([[0, 1], [3, 3]])] * 2,
    "mask": lambda w, x: w[torch.tensor([True, False, True, False])] + 1,
    "slice": lambda w, x: w[1:3].sum(0),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_as_with_the_dequantized_stack(config: QuantizationConfig, operation: str) -> None:
    torch.manual_seed(0)
    stack = quantize(torch.randn(4, 64, 96) / 8, config)
    x = torch.randn(12, 96)
    run = OPERATIONS[operation]
    assert_close(run(stack, x), run(stack.dequantize(), x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("operation", ["grouped_mm", "index and bmm", "bmm with all", "select"])
def test_gradient_of_the_input(config: QuantizationConfig, operation: str) -> None:
    torch.manual_seed(0)
    stack = quantize(torch.randn(4, 64, 96) / 8, config)
    x = torch.randn(12, 96, requires_grad=True)
    run = OPERATIONS[operation]
    (grad,) = torch.autograd.grad(run(stack, x).square().sum(), x)
    (expected,) = torch.autograd.grad(run(stack.dequantize(), x).square().sum(), x)
    assert_close(grad, expected, rtol=1e-4, atol=1e-4)


def test_picked_experts_stay_quantized(config: QuantizationConfig) -> None:
    stack = quantize(torch.randn(4, 64, 96), config)
    picked = stack[torch.tensor([2, 0])]
    assert isinstance(picked, QuantizedTensor)
    assert torch.equal(picked.dequantize(), stack.dequantize()[[2, 0]])
    with pytest.raises(NotImplementedError, match="would round it"):
        picked.mul_(2)
    assert torch.equal(picked * 2, stack.dequantize()[[2, 0]] * 2)


def test_blocks_that_span_experts() -> None:
    stack = quantize(torch.randn(4, 5, 7), QuantizationConfig("nf4", compute_dtype=None))
    index = torch.tensor([2, 0])
    assert torch.equal(stack[index], stack.dequantize()[index])
    x = torch.randn(6, 7)
    found = F.grouped_mm(x, stack.mT, offs=ends(2, 0, 4, 0))
    assert_close(found, torch.cat([x[:2] @ stack[0].t(), x[2:] @ stack[2].t()]))


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most memory that torch's CPU allocator has out during a call, beyond what was out before."""
    run()  # what is allocated once, codebooks among them
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    out = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        out += event.nbytes()
        peak = max(peak, out)
    del kept
    return peak


HIDDEN, WIDTH, EXPERTS, USED = 256, 128, 64, 8


def layer(way: str, config: QuantizationConfig) -> tuple[torch.nn.Module, torch.Tensor]:
    """The experts of a Mixtral layer, as transformers has them."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    sizes = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_local_experts=EXPERTS,
        num_experts_per_tok=USED,
        experts_implementation=way,
    )
    torch.manual_seed(0)
    experts = MixtralExperts(sizes)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 0.05)
    return tuckaway.load_and_quantize_model(experts, config, device_map={"": "cpu"}), torch.randn(1, HIDDEN)


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_memory_of_a_layer_is_that_of_the_experts_in_use(way: str, format: str) -> None:
    config = QuantizationConfig(format, compute_dtype=torch.float32, int8_threshold=None)
    experts, x = layer(way, config)
    assert quantized_names(experts) == {"gate_up_proj", "down_proj"}
    index = torch.arange(3, 3 + USED * 7, 7)[None]
    weights = torch.full((1, USED), 1 / USED)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return experts(x, index, weights)  # type: ignore[no-any-return]

    one = 3 * HIDDEN * WIDTH * 4
    assert peak_bytes(run) <= USED * one  # and the whole stack would be 64 of them
    plain = [torch.nn.Parameter(p.dequantize()) for p in experts.parameters()]  # type: ignore[operator]
    found = run()
    experts.gate_up_proj, experts.down_proj = plain
    assert_close(found, run(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss", "Olmoe", "Llama4"])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_share_of_expert_bytes_that_is_quantized(name: str, format: str) -> None:
    from zoo.language_models import MIXTURES

    with tuckaway.init_empty_weights():
        model = next(entry for entry in MIXTURES if entry.name == name).build()
    from tuckaway.plan import choose_specs

    specs, _ = choose_specs(model, QuantizationConfig(format))
    stacks = {n: p.numel() for n, p in model.named_parameters() if ".experts." in n}
    assert stacks
    done = sum(count for n, count in stacks.items() if specs[n].layout is not None)
    assert done >= 0.97 * sum(stacks.values())
