"""Memory in use against the plan, over 20 models and maps.

    python benchmarks/plan_accuracy.py [--miniature] [--out FOLDER]

Each of five models is planned, loaded and run once under four maps. On an accelerator, three figures are compared
with the plan: what is allocated once the model has run, and the most that was allocated while it was loaded and while
it ran. The first must be within 2 % or 32 MiB of the plan and never above it, the others never above. Without an
accelerator the bytes of resident tensors, slots, arena and store are compared, which must be equal. ``--miniature``
takes models of a few megabytes.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, save
from safetensors.torch import save_file
from torch import nn

import tuckaway

TOLERANCE_BYTES = 32 * 2**20
TOLERANCE = 0.02
LENGTH = 256


class Experts(nn.Module):
    """A router and stacked experts, two of which every token goes through."""

    def __init__(self, width: int, inner: int, count: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.router = nn.Linear(width, count, bias=False)
        self.up = nn.Parameter(torch.empty(count, inner, width))
        self.down = nn.Parameter(torch.empty(count, width, inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[batch, length, width]`` for the same."""
        h = self.norm(x)
        for expert in self.router(h[0, -1]).topk(2).indices.tolist():
            y = nn.functional.linear(h, self.up[expert])
            x = x + nn.functional.linear(torch.relu(y), self.down[expert])
        return x


class Stack(nn.Module):
    """Blocks between an embedding and a head of odd sizes, tied or not, with buffers."""

    def __init__(self, blocks: list[nn.Module], width: int, words: int, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.register_buffer("scale", torch.ones(width), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits ``[batch, length, words]`` of tokens ``[batch, length]``."""
        x = self.embed(tokens)
        x = x * self.scale.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def llama(hidden: int, layers: int, words: int, *, tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128,
            vocab_size=words,
            tie_word_embeddings=tied,
            max_position_embeddings=2048,
        )
    )


def gpt2(hidden: int, layers: int, words: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_embd=hidden, n_layer=layers, n_head=hidden // 64, vocab_size=words, n_positions=1024)
    )


def odd(width: int, inner: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))


def models(small: bool) -> dict[str, Callable[[], nn.Module]]:
    s = 8 if small else 1
    return {
        "llama": lambda: llama(2048 // s, 12, 32000 // s, tied=False),
        "llama tied": lambda: llama(1024 // s, 12, 128256 // s, tied=True),
        "gpt2": lambda: gpt2(1024 // s, 12, 50257 // s),
        "experts": lambda: Stack(
            [Experts(1024 // s, 1408 // s, 16) for _ in range(6)], 1024 // s, 10007 // s, tied=False
        ),
        "odd": lambda: Stack(
            [odd(1000 // s, 3001 // s) for _ in range(24)], 1000 // s, 30011 // s, tied=True
        ),
    }  # fmt: skip


def write(structure: nn.Module, folder: Path) -> None:
    """Write a bf16 checkpoint of cheap values, one random vector over and over; tied tensors once."""
    chunk = (torch.randn(1 << 20) * 0.02).to(torch.bfloat16)
    tensors = {}
    for name, parameter in structure.named_parameters():
        repeats = -(-parameter.numel() // len(chunk))
        tensors[name] = chunk.repeat(repeats)[: parameter.numel()].view(parameter.shape).contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")


def maps(model: nn.Module) -> Iterator[tuple[str, str, Any, dict[Any, int] | None]]:
    """Yield name, format, device map and budget."""
    first = 0 if torch.accelerator.is_available() else "cpu"
    stack = next(name for name, m in model.named_modules() if isinstance(m, nn.ModuleList))
    count = len(model.get_submodule(stack))
    yield "resident nf4", "nf4", {"": first}, None
    away = {f"{stack}.{i}": "cpu" if i % 2 else "disk" for i in range(count // 3, count)}
    yield "int8, two thirds away", "int8", {"": first, **away}, None
    yield "bf16, all blocks away", "bf16", {"": first, stack: "cpu" if first == 0 else "disk"}, None
    whole = tuckaway.plan(model, "nf4", {"": first}, sequence_length=LENGTH)
    memory = whole.on(first)
    beside = memory.reserve_bytes if first == "cpu" else max(memory.loading_bytes, memory.reserve_bytes)
    each = [block.nbytes for block in whole.blocks if block.name.startswith(f"{stack}.")]
    budget = memory.weights_bytes - sum(each) * 3 // 4 + 2 * max(each) + beside
    yield "nf4, auto", "nf4", "auto", {first: budget, **({"cpu": 2**36} if first == 0 else {})}


def measured(
    name: str, build: Callable[[], nn.Module], folder: Path, scratch: Path
) -> Iterator[dict[str, Any]]:
    """Yield one row for each map of a model."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    with tuckaway.init_empty_weights():
        structure = build().eval()
        if hasattr(structure, "tie_weights"):
            structure.tie_weights()
    for number, (kind, format, places, budget) in enumerate(maps(structure)):
        with tuckaway.init_empty_weights():
            model = build().eval()
            if hasattr(model, "tie_weights"):
                model.tie_weights()
        plan = tuckaway.plan(model, format, places, budget, sequence_length=LENGTH)
        main = plan.execution_device
        gc.collect()
        base = 0
        if device is not None:
            torch.accelerator.empty_cache()
            torch.accelerator.reset_peak_memory_stats()
            base = torch.accelerator.memory_allocated()
        began = time.perf_counter()
        model = tuckaway.load_and_quantize_model(
            model,
            weights_location=folder,
            device_map=plan,
            offload_folder=scratch / f"{number}",
            progress=False,
        )
        seconds = time.perf_counter() - began
        tokens = torch.zeros(1, LENGTH, dtype=torch.long, device=device or "cpu")
        peaks = [torch.accelerator.max_memory_allocated() - base] if device is not None else []
        with torch.no_grad():
            del_me = model(tokens)
            del del_me
        paging = model.__dict__.get("_tuckaway_paging")
        slots = 0 if paging is None else paging.pager.nbytes
        row: dict[str, Any] = {"model": name, "map": kind, "load_seconds": seconds}
        if device is not None:
            torch.accelerator.synchronize()
            peaks.append(torch.accelerator.max_memory_allocated() - base)
            used = torch.accelerator.memory_allocated() - base - tokens.nbytes
            row |= {"planned_bytes": plan.on(main).in_use_bytes, "used_bytes": used}
            row |= {
                "planned_peak_bytes": plan.on(main).peak_bytes,
                "load_peak_bytes": peaks[0],
                "peak_bytes": peaks[1],
            }
            row["planned_loading_bytes"] = plan.on(main).loading_bytes
            row["reserve_bytes"] = plan.on(main).reserve_bytes
        else:
            found = tuckaway.memory_footprint(model, by_device=True)
            row |= {"planned_bytes": plan.on("cpu").in_use_bytes, "used_bytes": found["cpu"] + slots}
        arena = None if paging is None else paging.homes.arena
        if arena is not None:
            ram = plan.on("cpu")
            row |= {"planned_arena_bytes": ram.weights_bytes + ram.padding_bytes, "arena_bytes": arena.nbytes}
        if paging is not None and paging.homes.store is not None:
            row |= {
                "planned_store_bytes": plan.on("disk").in_use_bytes,
                "store_bytes": paging.plan.store_nbytes,
            }
        row["holds"] = holds(row)
        yield row
        tuckaway.materialize(model, "cpu")
        del model, paging, arena


def holds(row: dict[str, Any]) -> bool:
    """Whether a row is as promised."""
    over = row["planned_bytes"] - row["used_bytes"]
    fine = 0 <= over <= max(TOLERANCE * row["planned_bytes"], TOLERANCE_BYTES)
    for part in ("arena", "store"):
        fine &= row.get(f"planned_{part}_bytes") == row.get(f"{part}_bytes")
    if "peak_bytes" in row:
        return bool(fine and max(row["peak_bytes"], row["load_peak_bytes"]) <= row["planned_peak_bytes"])
    return bool(fine and over == 0)


def warm_up(scratch: Path) -> None:
    """Allocate what a process allocates once: workspaces of the matrix library, tables of the kernels."""
    if not torch.accelerator.is_available():
        return
    x = torch.ones(64, 1024, device=torch.accelerator.current_accelerator(), dtype=torch.bfloat16)
    for format in ("nf4", "int8"):
        w = tuckaway.quantize(torch.ones(1024, 1024, device=x.device, dtype=torch.bfloat16), format)
        for rows in (1, 16, 64):
            nn.functional.linear(x[:rows], w)
    (x @ x.T).sum().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--miniature", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    small = options.miniature or not torch.accelerator.is_available()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        warm_up(Path(scratch))
        for name, build in models(small).items():
            folder = Path(scratch) / name
            with tuckaway.init_empty_weights():
                structure = build()
                if hasattr(structure, "tie_weights"):
                    structure.tie_weights()
            write(structure, folder)
            for row in measured(name, build, folder, folder / "pages"):
                rows.append(row)
                show(row)
    short = [row for row in rows if not row["holds"]]
    print(f"{len(rows) - len(short)} of {len(rows)} as planned")
    print(save("plan_accuracy" + ("_miniature" if small else ""), rows, options.out))


def show(row: dict[str, Any]) -> None:
    """Print one row in MB."""
    sizes = {key[:-6]: round(value / 1e6, 2) for key, value in row.items() if key.endswith("_bytes")}
    state = "ok" if row["holds"] else "NO"
    print(row["model"], "|", row["map"], "|", state, sizes, f"{row['load_seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    main()
