"""The conversion, compared with the definition of GGUF's Q4_1 and of llama.cpp's order of rotary rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tuckaway.cli.gguf_llama import convert, is_finished

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS, HEAD_DIM, WIDTH, INNER = 4, 2, 8, 32, 64
TOKENS = ["<end>", "<start>", "a", "b", "ab", "Ġ", "1"]


def q4_1(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize ``[N, K]`` to Q4_1 (blocks of 32, an fp16 step and an fp16 minimum); return bytes and decoded values."""
    blocks = values.reshape(-1, 32)
    low = blocks.min(1).astype(np.float16)
    step = ((blocks.max(1) - blocks.min(1)) / 15).astype(np.float16)
    codes = np.clip(np.rint((blocks - low[:, None]) / step[:, None]), 0, 15).astype(np.uint8)
    packed = codes[:, :16] | codes[:, 16:] << 4
    raw = np.concatenate([step[:, None].view(np.uint8), low[:, None].view(np.uint8), packed], axis=1)
    decoded = codes * step[:, None].astype(np.float32) + low[:, None].astype(np.float32)
    return raw.reshape(values.shape[0], -1), decoded.astype(np.float32).reshape(values.shape)


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Order a head's rows as llama.cpp has them: x0 y0 x1 y1 ... from x0 x1 ... y0 y1 ..."""
    out = np.empty_like(rows)
    for head in range(heads):
        part = rows[head * HEAD_DIM : (head + 1) * HEAD_DIM]
        half = HEAD_DIM // 2
        out[head * HEAD_DIM : (head + 1) * HEAD_DIM : 2] = part[:half]
        out[head * HEAD_DIM + 1 : (head + 1) * HEAD_DIM : 2] = part[half:]
    return out


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A GGUF file of a Llama with one layer, and what its tensors must become."""
    rng = np.random.default_rng(0)
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages }}")
    expected = {}
    layer = "model.layers.0."
    for name, target, rows, cols, heads in [
        ("blk.0.attn_q", layer + "self_attn.q_proj", HEADS * HEAD_DIM, WIDTH, HEADS),
        ("blk.0.attn_k", layer + "self_attn.k_proj", KV_HEADS * HEAD_DIM, WIDTH, KV_HEADS),
        ("blk.0.attn_v", layer + "self_attn.v_proj", KV_HEADS * HEAD_DIM, WIDTH, 0),
        ("blk.0.attn_output", layer + "self_attn.o_proj", WIDTH, WIDTH, 0),
        ("blk.0.ffn_gate", layer + "mlp.gate_proj", INNER, WIDTH, 0),
        ("blk.0.ffn_up", layer + "mlp.up_proj", INNER, WIDTH, 0),
        ("blk.0.ffn_down", layer + "mlp.down_proj", WIDTH, INNER, 0),
        ("token_embd", "model.embed_tokens", len(TOKENS), WIDTH, 0),
    ]:
        raw, decoded = q4_1(rng.standard_normal((rows, cols)).astype(np.float32))
        expected[f"{target}.weight"] = decoded
        if heads:
            raw = interleaved(raw, heads)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    for name, target in [
        ("blk.0.attn_norm", layer + "input_layernorm"),
        ("blk.0.ffn_norm", layer + "post_attention_layernorm"),
        ("output_norm", "model.norm"),
    ]:
        expected[f"{target}.weight"] = rng.standard_normal(WIDTH).astype(np.float32)
        writer.add_tensor(f"{name}.weight", expected[f"{target}.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, expected


def test_weights_are_what_gguf_defines(llama: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    path, expected = llama
    folder = tmp_path / "made"
    folder.mkdir()
    assert not is_finished(folder)
    convert(path, folder)
    assert is_finished(folder)
    tensors = load_file(folder / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {n: v.shape for n, v in expected.items()}
    for name, value in expected.items():
        assert torch.equal(tensors[name], torch.from_numpy(value)), name


def test_transformers_reads_the_folder(llama: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    convert(llama[0], tmp_path)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("<start>ab1a").input_ids == [1, 4, 6, 2]
    assert tokenizer.decode([4, 5, 6]) == "ab 1"
    assert tokenizer.eos_token_id == 0


@pytest.mark.slow
def test_smollm2_is_the_published_one(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["tie_word_embeddings"]) == (
        30,
        576,
        True,
    )
    tensors = load_file(smollm2 / "model.safetensors")
    assert len(tensors) == 272
    assert sum(t.numel() for t in tensors.values()) == 134_515_008
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    assert digest.hexdigest() == "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"
