"""Checkpoints to measure with: GPT-2 shaped, in minGPT's layout, or Llama-shaped; seeded, of any size.

    python benchmarks/material.py OUT [--model gpt2-xl] [--layers N] [--dtype float32] [--shard-mb 1000]

The values are normal with GPT-2's standard deviations, rows of differing scale, and LayerNorm gains that are large in
six feature columns, so that the inputs of ``c_attn`` and ``c_fc`` exceed LLM.int8()'s threshold there and hardly
anywhere else. They are made up: nothing about quality follows from them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch

from tuckaway.checkpoint import CheckpointWriter
from tuckaway.checkpoint.header import DTYPES
from tuckaway.checkpoint.shards import plan_shards

GPT2 = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
"""Layers, heads and width."""
VOCABULARY, CONTEXT = 50257, 1024
LLAMA_7B = {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "vocabulary": 32000}

Shape = tuple[int, ...]


def gpt2_tensors(layers: int, width: int) -> Iterator[tuple[str, Shape]]:
    """Yield name and shape of every tensor, in the order of a ``state_dict``."""
    yield "transformer.wte.weight", (VOCABULARY, width)
    yield "transformer.wpe.weight", (CONTEXT, width)
    for layer in range(layers):
        block = f"transformer.h.{layer}."
        for norm in ("ln_1", "ln_2"):
            yield f"{block}{norm}.weight", (width,)
            yield f"{block}{norm}.bias", (width,)
        yield f"{block}attn.bias", (1, 1, CONTEXT, CONTEXT)
        for name, out, inner in (
            ("attn.c_attn", 3 * width, width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", 4 * width, width),
            ("mlp.c_proj", width, 4 * width),
        ):
            yield f"{block}{name}.weight", (out, inner)
            yield f"{block}{name}.bias", (out,)
    yield "transformer.ln_f.weight", (width,)
    yield "transformer.ln_f.bias", (width,)
    yield "lm_head.weight", (VOCABULARY, width)


def llama_tensors(
    layers: int, hidden: int, intermediate: int, heads: int, vocabulary: int
) -> Iterator[tuple[str, Shape]]:
    """Yield name and shape of every tensor of a Llama without grouped queries."""
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        block = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{block}self_attn.{name}.weight", (hidden, hidden)
        yield f"{block}mlp.gate_proj.weight", (intermediate, hidden)
        yield f"{block}mlp.up_proj.weight", (intermediate, hidden)
        yield f"{block}mlp.down_proj.weight", (hidden, intermediate)
        yield f"{block}input_layernorm.weight", (hidden,)
        yield f"{block}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def values(name: str, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor called ``name``; it depends on nothing but name and shape."""
    seed = zlib.crc32(("transformer.wte.weight" if name == "lm_head.weight" else name).encode())
    generator = torch.Generator().manual_seed(seed)
    if name.endswith(".attn.bias"):
        return torch.tril(torch.ones(shape[-2:])).view(shape).to(dtype)
    if len(shape) == 1:
        tensor = 0.05 * torch.randn(shape, generator=generator)
        if name.endswith("weight"):
            tensor += 1.0 if "ln_f" in name or "norm" in name else 0.4
        if name.endswith(("ln_1.weight", "ln_2.weight")):
            tensor[_outlier_columns(shape[0])] = 8 + 8 * torch.rand(6, generator=generator)
        return tensor.to(dtype)
    deviation = 0.04 if "wte" in name or "lm_head" in name or "embed" in name else 0.9 / math.sqrt(shape[-1])
    tensor = torch.randn(shape, generator=generator)
    tensor *= deviation * torch.exp(0.35 * torch.randn(shape[0], 1, generator=generator))
    if name.endswith(("c_attn.weight", "c_fc.weight")):
        tensor[:, _outlier_columns(shape[1])] *= 0.1
    return tensor.to(dtype)


def _outlier_columns(width: int) -> torch.Tensor:
    return torch.randperm(width, generator=torch.Generator().manual_seed(width))[:6]


def write(
    folder: Path, tensors: list[tuple[str, Shape]], dtype: torch.dtype, shard_bytes: int, threads: int = 8
) -> int:
    """Write a checkpoint and return its bytes; a few tensors are in memory at once."""
    writer = CheckpointWriter(folder, max_shard_size=shard_bytes)
    with writer, ThreadPoolExecutor(threads) as pool:
        writer.plan([(name, dtype, shape) for name, shape in tensors])
        todo = iter(tensors)
        pending = [(item[0], pool.submit(values, *item, dtype)) for item in islice(todo, threads)]
        while pending:
            name, future = pending.pop(0)
            writer.write(name, future.result())
            for item in islice(todo, 1):
                pending.append((item[0], pool.submit(values, *item, dtype)))
        writer.commit()
    return sum(math.prod(shape) * dtype.itemsize for _, shape in tensors)


def write_tiled(
    folder: Path, tensors: list[tuple[str, Shape]], dtype: torch.dtype, shard_bytes: int, threads: int = 16
) -> int:
    """Write a checkpoint as fast as the page cache takes it, as other programs do: no checksums; return its bytes.

    Matrices are one tile of normal values over and over, vectors are ones: good for times, not for answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tile = (torch.randn(16 * 2**20, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    tile_bytes = memoryview(tile.view(torch.uint8).numpy())
    ones = memoryview(torch.ones(2**20, dtype=dtype).view(torch.uint8).numpy())
    shards = plan_shards([(name, dtype, shape) for name, shape in tensors], shard_bytes, {"format": "pt"})
    weight_map = {}
    jobs = []
    for number, shard in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        header = plain_header(shard.tensors)
        os.pwrite(fd, header, 0)
        for name, (_, shape, offset, nbytes) in shard.tensors.items():
            weight_map[name] = path.name
            source = ones if len(shape) == 1 else tile_bytes
            for start in range(0, nbytes, len(source)):
                data = source[: min(len(source), nbytes - start)]
                jobs.append((fd, data, len(header) + offset + start))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda job: os.pwrite(*job), jobs))
    for fd in {job[0] for job in jobs}:
        os.fsync(fd)
        os.close(fd)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(shard.data_bytes for shard in shards)


def plain_header(tensors: dict[str, tuple[torch.dtype, Shape, int, int]]) -> bytes:
    """Return a safetensors header without checksums, padded to 8 bytes."""
    names = {dtype: key for key, dtype in DTYPES.items()}
    content = {
        name: {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        for name, (dtype, shape, offset, nbytes) in tensors.items()
    }
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="gpt2-xl", choices=[*GPT2, "llama-7b"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--shard-mb", type=int, default=1000)
    options = parser.parse_args()
    if options.model == "llama-7b":
        shape = {**LLAMA_7B, **({"layers": options.layers} if options.layers else {})}
        tensors = list(llama_tensors(**shape))
    else:
        layers, _, width = GPT2[options.model]
        tensors = list(gpt2_tensors(options.layers or layers, width))
    size = write(options.out, tensors, getattr(torch, options.dtype), options.shard_mb * 10**6)
    print(
        json.dumps(
            {"model": options.model, "tensors": len(tensors), "bytes": size, "folder": str(options.out)}
        )
    )


if __name__ == "__main__":
    main()
