"""transformers' GPT-2, whose projections are no ``nn.Linear``: ``Conv1D`` keeps its weight the other way round, [K, N].

    python examples/gpt2_conv1d.py

A quantized weight is a tensor, so it does not matter which module holds it. The blocks of weights that share a scale
run along the input dimension all the same, which for ``Conv1D`` means that the codes are stored transposed.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tuckaway


def main() -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 128, "vocab_size": 512, "n_positions": 64}
    architecture = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    with tempfile.TemporaryDirectory() as folder:
        original = GPT2LMHeadModel(architecture).eval()
        original.save_pretrained(folder)

        with tuckaway.init_empty_weights():
            model = GPT2LMHeadModel(architecture).eval()
        config = tuckaway.QuantizationConfig(format="int8", int8_threshold=None, compute_dtype=torch.float32)
        model = tuckaway.load_and_quantize_model(
            model, config, weights_location=folder, device_map="auto", no_split_module_classes=["GPT2Block"]
        )

    projection = model.transformer.h[0].attn.c_attn
    print(f"{type(projection).__name__}.weight {list(projection.weight.shape)}: {projection.weight.format}")
    print(f"{tuckaway.memory_footprint(original):,} bytes became {tuckaway.memory_footprint(model):,}")

    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = original(tokens).logits
        logits = model(tokens.to(model.device)).logits.cpu()
    print(
        f"largest difference of a logit: {(logits - expected).abs().max():.4f}, spread {expected.std():.4f}"
    )


if __name__ == "__main__":
    main()
