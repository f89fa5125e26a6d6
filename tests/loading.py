"""Models, checkpoints and comparisons that the tests of formats, loading and saving share."""

from __future__ import annotations

import gc
import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tuckaway
from tuckaway.errors import TuckawayError
from tuckaway.tensor import QuantizedTensor, components_of

FP32 = tuckaway.QuantizationConfig(compute_dtype=torch.float32)
"""nf4, nested, everything else in fp32: what most tests load to."""

FORMATS = ["nf4", "fp4", "int8"]


class Layer(nn.Module):
    """A decoder layer's skeleton: a norm, two linear layers and a matrix that is written by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.w = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(torch.relu(self.up(h))) + h @ self.w


class Net(nn.Module):
    """Embedding, layers, a rotary-like buffer that no checkpoint holds, a running one that it does, and a head."""

    def __init__(self, layers: int = 3, width: int = 64, vocabulary: int = 96, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("freq", 1.0 / (torch.arange(width) + 1.0), persistent=False)
        self.register_buffer("shift", torch.zeros(width))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + (self.freq + self.shift).to(x.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def net(seed: int = 0, **options: Any) -> Net:
    """A network with weights, the same ones for the same seed."""
    torch.manual_seed(seed)
    model = Net(**options).eval()
    nn.init.normal_(model.shift)
    return model


def empty_net(**options: Any) -> Net:
    """The same network without weights."""
    with tuckaway.init_empty_weights():
        return Net(**options).eval()


def tokens(vocabulary: int = 96, batch: int = 2, length: int = 7) -> torch.Tensor:
    """Input for a model of this vocabulary, always the same."""
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def tiny_llama_config(**options: Any) -> Any:
    """A Llama of 60,000 parameters."""
    from transformers import LlamaConfig

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**sizes, **options})


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a folder's safetensors files, with safetensors' own reader."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def edit(path: Path, change: Any) -> None:
    """Rewrite a JSON file, an index's checksum aside."""
    content = json.loads(path.read_text())
    for key in ("tuckaway.checksums", "tuckaway.crc32"):
        content.get("metadata", {}).pop(key, None)
    change(content)
    path.write_text(json.dumps(content))


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal dtype, shape and bits, quantized or plain."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    parts, others = components_of(a), components_of(b)
    assert parts.keys() == others.keys()
    for key, part in parts.items():
        left, right = part.detach().contiguous(), others[key].detach().contiguous()
        assert (left.dtype, left.shape) == (right.dtype, right.shape), key
        assert torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)), key


def assert_same_state(model: nn.Module, expected: nn.Module) -> None:
    """Every parameter and buffer of two resident models has the same bits."""
    for named in ("named_parameters", "named_buffers"):
        found = dict(getattr(model, named)())
        wanted = dict(getattr(expected, named)())
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert_same_bits(found[name], tensor)


def quantized_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are quantized."""
    return {name for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def decoded_by_bitsandbytes(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Decode one 4-bit weight: read by bitsandbytes' own reader, multiplied here.

    Its own CPU dequantization is wrong where rows are no multiple of the blocksize.
    """
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    stats = {
        f"weight.{key.removeprefix('weight.')}": value for key, value in state.items() if key != "weight"
    }
    quantized = QuantState.from_dict(dict(stats), device=torch.device("cpu"))
    scales = quantized.absmax
    if quantized.nested:
        scales = dequantize_blockwise(quantized.absmax, quantized.state2) + quantized.offset
    packed = state["weight"].reshape(-1).view(torch.uint8)
    index = torch.stack([packed >> 4, packed & 15], -1).reshape(-1)[: math.prod(quantized.shape)].long()
    blocks = torch.arange(index.numel()) // quantized.blocksize
    return (quantized.code[index] * scales.float()[blocks]).to(quantized.dtype).reshape(quantized.shape)


def _listing(folder: Path | None) -> dict[str, tuple[int, int]]:
    if folder is None or not folder.exists():
        return {}
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "tuckaway.lock"
    }


def _hooks(model: nn.Module) -> list[tuple[int, ...]]:
    return [
        (
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            len(m._state_dict_hooks),
            len(m._load_state_dict_pre_hooks),
            int("_hf_hook" in m.__dict__),
            int("forward" in m.__dict__),
        )
        for m in model.modules()
    ]


def _open_files(process: psutil.Process) -> set[tuple[str, int]]:
    """Return path and descriptor of every open file, also of those in folders that this user may not enter."""
    links = Path("/proc/self/fd")
    if not links.is_dir():
        return {(f.path, f.fd) for f in process.open_files()}
    found = set()
    for number in os.listdir(links):
        with suppress(FileNotFoundError):  # the one that lists
            found.add((os.readlink(links / number), int(number)))
    return {
        (path, number) for path, number in found if path.startswith("/") and not path.startswith("/proc/")
    }


@contextmanager
def refused(
    error: type[TuckawayError], match: str, model: nn.Module, folder: Path | None = None
) -> Iterator[Any]:
    """The block raises ``error``, and leaves model, offload folder, files and threads as they were."""
    gc.collect()  # what earlier tests left open
    process = psutil.Process()
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    values = [None if t.is_meta else t.detach().clone() for _, t in tensors]
    attributes, hooks, files = set(model.__dict__), _hooks(model), _listing(folder)
    opened = _open_files(process)
    descriptors, threads = process.num_fds(), threading.active_count()
    with pytest.raises(error, match=match) as caught:
        yield caught
    # what follows holds while the traceback is alive: nobody has to drop the exception first
    assert process.num_fds() == descriptors
    assert _open_files(process) == opened
    assert threading.active_count() == threads
    after = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    assert [name for name, _ in after] == [name for name, _ in tensors]
    for (_, new), (_, old), value in zip(after, tensors, values, strict=True):
        assert new is old
        if value is not None:
            assert_same_bits(new, value)
    assert set(model.__dict__) == attributes
    assert _hooks(model) == hooks
    assert _listing(folder) == files
