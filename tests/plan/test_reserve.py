"""The reserve: of known parts, and at least what a forward really takes."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tuckaway.config import QuantizationConfig
from tuckaway.empty import init_empty_weights
from tuckaway.plan import choose_specs
from tuckaway.plan.reserve import estimate_reserve

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


def test_keys_and_values_are_counted_exactly():
    with init_empty_weights():
        model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    found = estimate_reserve(model, batch_size=3, sequence_length=50, dtype=torch.bfloat16)
    assert found.cache_bytes == 2 * 3 * 3 * 50 * 2 * 16 * 2
    config = LlamaConfig(**LLAMA, use_cache=False)
    with init_empty_weights():
        assert estimate_reserve(LlamaForCausalLM(config)).cache_bytes == 0


def test_a_weight_is_decoded_at_a_time_and_an_expert_of_a_stack():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.empty(8, 256, 128))

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(128, 512), Experts(), nn.Linear(128, 8))
    specs, _ = choose_specs(model, QuantizationConfig())
    assert estimate_reserve(model, specs, dtype=torch.bfloat16).decoding_bytes == 2 * 128 * 512
    assert estimate_reserve(model, specs, accelerator=False).workspace_bytes == 0


class Peak(TorchDispatchMode):
    """The most bytes of storages that were alive at once, beside those of a model."""

    def __init__(self, model):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        self.users, self.sizes, self.peak = Counter(), {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                key = tensor.untyped_storage()._cdata
                self.users[key] += 1
                self.sizes[key] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor, self.leave, key)
        self.peak = max(self.peak, sum(size for key, size in self.sizes.items() if self.users[key]))
        return out

    def leave(self, key):
        self.users[key] -= 1


@pytest.mark.parametrize("length", [16, 200])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_forward_takes_no_more(kind, batch, length):
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_head=4, n_layer=3, vocab_size=300))
    model.eval()
    found = estimate_reserve(
        model, batch_size=batch, sequence_length=length, dtype=torch.float32, accelerator=False
    )
    tokens = torch.zeros(batch, length, dtype=torch.long)
    with torch.no_grad(), Peak(model) as peak:
        out = model(tokens)
        del out
    assert peak.peak <= found.nbytes < 5 * peak.peak
