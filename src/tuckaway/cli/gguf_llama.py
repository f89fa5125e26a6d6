"""A Llama in a GGUF file, turned into a Hugging Face folder: safetensors in fp32, config and tokenizer.

GGUF names tensors in its own way, and llama.cpp's converter interleaves the two rotary halves of every query and key
head; both are undone here. Values are decoded exactly as the file defines them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tuckaway.checkpoint import CheckpointWriter
from tuckaway.files import write_atomically

__all__ = ["convert", "is_finished"]

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3
"""GGUF's token type of special tokens."""

Meta = dict[str, Any]


def convert(gguf: Path, folder: Path) -> None:
    """Write a Llama's weights, config, generation config and tokenizer into a folder.

    Tensors are decoded and written one at a time. Every file appears whole, ``config.json`` last: :func:`is_finished`
    goes by it.

    Args:
        gguf: the GGUF file: architecture ``llama``, a byte-level BPE tokenizer with the pre-tokenizer ``smollm``.
        folder: made if it does not exist.

    Raises:
        StoreBusy: another process is writing to the folder.
        StoreError: the folder cannot be written to.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    names = [_name(tensor.name) for tensor in reader.tensors]
    with CheckpointWriter(folder) as writer:
        shapes = [tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors]
        writer.plan([(name, torch.float32, shape) for name, shape in zip(names, shapes, strict=True)])
        for name, tensor in zip(names, reader.tensors, strict=True):
            writer.write(name, _decoded(tensor, meta))
        writer.commit()
    write_atomically(folder / "tokenizer.json", _tokenizer(meta).to_str(pretty=True).encode())
    write_atomically(folder / "tokenizer_config.json", _json(_tokenizer_config(meta)))
    config = _config(meta, tied="lm_head.weight" not in names)
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_atomically(folder / "generation_config.json", _json(tokens))
    write_atomically(folder / "config.json", _json(config))


def is_finished(folder: Path) -> bool:
    """Tell whether :func:`convert` has come to its end in a folder."""
    return (folder / "config.json").is_file()


def _name(name: str) -> str:
    """Return transformers' name of a GGUF tensor."""
    stem, _, leaf = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    _, index, part = stem.split(".")
    return f"model.layers.{index}.{_LAYER[part]}.{leaf}"


def _decoded(tensor: Any, meta: Meta) -> torch.Tensor:
    """Return a GGUF tensor in fp32, in transformers' order of rows."""
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    if tensor.name.endswith("attn_q.weight"):
        values = _rotary_halves_apart(values, meta["llama.attention.head_count"])
    elif tensor.name.endswith("attn_k.weight"):
        values = _rotary_halves_apart(values, meta["llama.attention.head_count_kv"])
    return torch.from_numpy(
        np.array(values)
    )  # a copy: plain fp32 tensors are the mapped file, which is read-only


def _rotary_halves_apart(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's order of a head's rows, ``x0 y0 x1 y1 ...``: transformers rotates ``x0 x1 ... y0 y1 ...``.

    Args:
        rows: ``[heads * head_dim, K]``.
        heads: attention heads among the rows.
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _config(meta: Meta, *, tied: bool) -> Meta:
    theta = meta["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 10),  # GGUF has it in fp32
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "vocab_size": meta["llama.vocab_size"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def _tokenizer(meta: Meta) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # the pre-tokenizer that GGUF calls "smollm": every digit alone, then GPT-2's split into words
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
        if kind == _CONTROL
    ]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _tokenizer_config(meta: Meta) -> Meta:
    def token(role: str) -> str:
        return str(meta["tokenizer.ggml.tokens"][meta[f"tokenizer.ggml.{role}_token_id"]])

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta["tokenizer.chat_template"],
    }


def _json(value: Meta) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
