"""GPT-2 written by hand, in the layout of minGPT: no library behind the model, a checkpoint in shards, nf4 and paging.

    python examples/mingpt_gpt2.py
    python examples/mingpt_gpt2.py --checkpoint FOLDER --model-type gpt2-xl

Without ``--checkpoint`` a tiny one with random weights is made. The layout has what makes models hard to load: a
``ModuleDict`` that is never called, a lambda that closes over a submodule, and causal masks stored as buffers.
"""

from __future__ import annotations

import argparse
import math
import tempfile

import torch
from torch import nn
from torch.nn import functional as F

import tuckaway

SIZES = {  # layers, heads, width, vocabulary, positions
    "tiny": (4, 4, 128, 512, 64),
    "gpt2": (12, 12, 768, 50257, 1024),
    "gpt2-medium": (24, 16, 1024, 50257, 1024),
    "gpt2-large": (36, 20, 1280, 50257, 1024),
    "gpt2-xl": (48, 25, 1600, 50257, 1024),
}


class CausalSelfAttention(nn.Module):
    def __init__(self, heads: int, width: int, positions: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        mask = torch.ones(positions, positions).tril()
        self.register_buffer("bias", mask.view(1, 1, positions, positions))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, e = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.c_attn(x).split(e, dim=2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(e // self.heads)
        scores = scores.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        return self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, e))


class Block(nn.Module):
    def __init__(self, heads: int, width: int, positions: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CausalSelfAttention(heads, width, positions)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        m = self.mlp
        self.mlpf = lambda x: m["c_proj"](F.gelu(m["c_fc"](x), approximate="tanh"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlpf(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, layers: int, heads: int, width: int, vocabulary: int, positions: int) -> None:
        super().__init__()
        self.positions = positions
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(positions, width),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList(Block(heads, width, positions) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        t = self.transformer
        x = t["drop"](t["wte"](tokens) + t["wpe"](torch.arange(tokens.shape[1], device=tokens.device)))
        for block in t["h"]:
            x = block(x)
        return self.lm_head(t["ln_f"](x))


def main() -> None:
    parser = argparse.ArgumentParser(description="GPT-2 in minGPT's layout, quantized")
    parser.add_argument("--checkpoint", help="folder, index, file or Hub id; left out, a tiny one is made")
    parser.add_argument("--model-type", choices=SIZES, default="tiny")
    parser.add_argument("--format", choices=["nf4", "fp4", "int8"], default="nf4")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        if args.checkpoint is None:
            torch.manual_seed(0)
            tuckaway.save_model(GPT(*SIZES[args.model_type]), scratch, max_shard_size="1MB")
        checkpoint = args.checkpoint or scratch
        with tuckaway.init_empty_weights():
            model = GPT(*SIZES[args.model_type]).eval()
        full = sum(4 * p.numel() for p in model.parameters())
        config = tuckaway.QuantizationConfig(format=args.format, compute_dtype=torch.float32)
        model = tuckaway.load_and_quantize_model(
            model, config, weights_location=checkpoint, device_map="auto", no_split_module_classes=["Block"]
        )
        print(
            f"{full / 1e6:,.1f} MB in fp32, {tuckaway.memory_footprint(model) / 1e6:,.1f} MB in {args.format}"
        )
        print("c_attn.weight:", model.transformer["h"][0].attn.c_attn.weight)

        tokens = torch.tensor([[1, 2, 3]], device=next(model.parameters()).device)
        with torch.no_grad():
            for _ in range(8):
                tokens = torch.cat([tokens, model(tokens[:, -model.positions :])[:, -1:].argmax(-1)], dim=1)
        print("tokens:", tokens[0].tolist())


if __name__ == "__main__":
    main()
