"""Tiny transformers models with random weights: a dense decoder, one with fused experts, one with ``Conv1D``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

KINDS = ("llama", "experts", "gpt2")


def config_of(kind: str) -> Any:
    """A config of a model of two layers, 64 wide."""
    from transformers import GPT2Config, LlamaConfig, Qwen3MoeConfig

    if kind == "gpt2":
        return GPT2Config(
            vocab_size=128,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        )
    common: dict[str, Any] = dict(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    if kind == "llama":
        return LlamaConfig(**common)
    return Qwen3MoeConfig(
        **common,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
        head_dim=16,
    )


def saved(kind: str, folder: Path, **changes: Any) -> Path:
    """A folder with a random model as transformers saves it: experts one by one."""
    from transformers import AutoModelForCausalLM

    config = config_of(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def tokens(count: int = 10) -> torch.Tensor:
    """A prompt."""
    return torch.arange(1, count + 1)[None]


def keys(folder: Path) -> list[str]:
    """Names of the tensors in a folder's one safetensors file."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sorted(file.keys())
