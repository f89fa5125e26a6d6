"""Memory in use against the plan, over 20 models and maps.

    python benchmarks/plan_accuracy.py [--budget 300] [--miniature] [--out FOLDER]

Each of eight models is planned, loaded and run once under four maps. On an accelerator, three figures are compared
with the plan: what is allocated once the model has run, and the most that was allocated while it was loaded and while
it ran. The first must be within 2 % or 32 MiB of the plan and never above it, the others never above. Without an
accelerator the bytes of resident tensors, slots, arena and store are compared, which must be equal. Every row is
written when it is known. ``--miniature`` takes models of a few megabytes.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Journal
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


def mixtral(hidden: int, layers: int, words: int) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=hidden,
            intermediate_size=hidden * 3 // 2,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            num_local_experts=8,
            vocab_size=words,
            max_position_embeddings=2048,
        )
    )


def t5(hidden: int, layers: int, words: int) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            d_model=hidden,
            d_ff=hidden * 4,
            d_kv=64,
            num_heads=hidden // 64,
            num_layers=layers,
            vocab_size=words,
            decoder_start_token_id=0,
        )
    )


def odd(width: int, inner: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))


class Convolutions(nn.Module):
    """A stem, residual blocks of two convolutions, and a head over what is left of the picture."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
                nn.BatchNorm2d(2 * width),
                nn.ReLU(),
                nn.Conv2d(2 * width, width, 1),
            )
            for _ in range(count)
        )
        self.head = nn.Linear(width, 1000)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        """Return ``[batch, 1000]`` of pictures ``[batch, 3, height, width]``."""
        x = self.stem(picture.to(self.stem.bias.dtype))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True)
class Kind:
    """A model and what it is run on.

    Args:
        build: makes it; under ``init_empty_weights``.
        inputs: keyword arguments of its forward, on a device.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[Any], dict[str, torch.Tensor]]

    def empty(self) -> Any:
        """Return it without weights."""
        with tuckaway.init_empty_weights():
            model: Any = self.build().eval()
            if hasattr(model, "tie_weights"):
                model.tie_weights()
        return model


def words(device: Any, *names: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(1, LENGTH, dtype=torch.long, device=device) for name in names}


def kinds(small: bool) -> dict[str, Kind]:
    s = 8 if small else 1

    def ids(device: Any) -> dict[str, torch.Tensor]:
        return words(device, "input_ids")

    def tokens(device: Any) -> dict[str, torch.Tensor]:
        return words(device, "tokens")

    return {
        "llama": Kind(lambda: llama(2048 // s, 12, 32000 // s, tied=False), ids),
        "llama tied": Kind(lambda: llama(1024 // s, 12, 128256 // s, tied=True), ids),
        "gpt2": Kind(lambda: gpt2(1024 // s, 12, 50257 // s), ids),
        "experts": Kind(
            lambda: Stack([Experts(1024 // s, 1408 // s, 16) for _ in range(6)], 1024 // s, 10007 // s, tied=False),
            tokens,
        ),
        "odd": Kind(
            lambda: Stack([odd(1000 // s, 3001 // s) for _ in range(24)], 1000 // s, 30011 // s, tied=True), tokens
        ),
        "mixtral": Kind(lambda: mixtral(1024 // s, 6, 32000 // s), ids),
        "t5, encoder and decoder": Kind(
            lambda: t5(1024 // s, 8, 32128 // s), lambda device: words(device, "input_ids", "decoder_input_ids")
        ),
        "convolutions": Kind(
            lambda: Convolutions(512 // s, 16), lambda device: {"picture": torch.zeros(1, 3, 64, 64, device=device)}
        ),
    }  # fmt: skip


def write(structure: nn.Module, folder: Path) -> None:
    """Write a bf16 checkpoint of cheap values, one random vector over and over; tied tensors once."""
    chunk = (torch.randn(1 << 20) * 0.02).to(torch.bfloat16)
    tensors = {}
    state = dict(structure.named_parameters()) | {
        name: buffer for name, buffer in structure.named_buffers() if name in structure.state_dict()
    }
    for name, tensor in state.items():
        repeats = -(-tensor.numel() // len(chunk))
        values = chunk.repeat(repeats)[: tensor.numel()].view(tensor.shape).contiguous()
        tensors[name] = values if tensor.is_floating_point() else torch.zeros_like(tensor, device="cpu")
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
    # as much as a quarter of the blocks takes, with all that comes on top
    beyond = {f"{stack}.{i}": "cpu" if first == 0 else "disk" for i in range(count // 4, count)}
    quarter = tuckaway.plan(model, "nf4", {"": first, **beyond}, sequence_length=LENGTH)
    budget = quarter.on(first).counted_bytes
    yield "nf4, auto", "nf4", "auto", {first: budget, **({"cpu": 2**36} if first == 0 else {})}


class Watch:
    """What an accelerator has allocated since this was made; nothing where there is none."""

    def __init__(self) -> None:
        self.device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        gc.collect()
        if self.device is not None:
            torch.accelerator.empty_cache()
            torch.accelerator.reset_peak_memory_stats()
            self.base = torch.accelerator.memory_allocated()

    def peak(self) -> int:
        """Return the most so far."""
        torch.accelerator.synchronize()
        return int(torch.accelerator.max_memory_allocated() - self.base)

    def now(self) -> int:
        """Return what is allocated."""
        return int(torch.accelerator.memory_allocated() - self.base)


def measured(
    kind: Kind, format: str, places: Any, budget: dict[Any, int] | None, folder: Path, scratch: Path
) -> dict[str, Any]:
    """Plan, load and run a model, and compare."""
    model = kind.empty()
    plan = tuckaway.plan(model, format, places, budget, sequence_length=LENGTH)
    watch = Watch()
    began = time.perf_counter()
    model = tuckaway.load_and_quantize_model(
        model, weights_location=folder, device_map=plan, offload_folder=scratch, progress=False
    )
    row: dict[str, Any] = {"load_seconds": round(time.perf_counter() - began, 3)}
    inputs = kind.inputs(watch.device or "cpu")
    if watch.device is not None:
        row["load_peak_bytes"] = watch.peak()
    with torch.no_grad():
        model(**inputs)
    row |= compared(model, plan, watch, sum(tensor.nbytes for tensor in inputs.values()))
    row["holds"] = holds(row)
    tuckaway.materialize(model, "cpu")
    return row


def compared(model: Any, plan: tuckaway.Plan, watch: Watch, inputs_bytes: int) -> dict[str, Any]:
    """Return bytes planned and in use, once the model has run."""
    paging, memory = model.__dict__.get("_tuckaway_paging"), plan.on(plan.execution_device)
    row: dict[str, Any] = {"planned_bytes": memory.in_use_bytes}
    if watch.device is not None:
        row |= {
            "used_bytes": watch.now() - inputs_bytes,
            "planned_peak_bytes": memory.peak_bytes,
            "peak_bytes": watch.peak(),
            "planned_loading_bytes": memory.loading_bytes,
            "reserve_bytes": memory.reserve_bytes,
        }
    else:
        slots = 0 if paging is None else paging.pager.nbytes
        row["used_bytes"] = tuckaway.memory_footprint(model, by_device=True)["cpu"] + slots
    if paging is not None and paging.homes.arena is not None:
        ram = plan.on("cpu")
        row["planned_arena_bytes"] = ram.weights_bytes + ram.padding_bytes
        row["arena_bytes"] = paging.homes.arena.nbytes
    if paging is not None and paging.homes.store is not None:
        row |= {
            "planned_store_bytes": plan.on("disk").in_use_bytes,
            "store_bytes": paging.plan.store_nbytes,
        }
    return row


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=300.0, help="seconds; then nothing more is begun")
    parser.add_argument("--miniature", action="store_true", help="models of a few megabytes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    small = options.miniature or not torch.accelerator.is_available()
    journal = Journal("plan_accuracy" + ("_miniature" if small else ""), options.budget, options.out)
    with tempfile.TemporaryDirectory() as scratch:
        warm_up(Path(scratch))
        for name, kind in kinds(small).items():
            journal.attempt(
                name, lambda name=name, kind=kind: model(journal, name, kind, Path(scratch)), 10.0
            )  # type: ignore[misc]
    rows = [row for row in journal.results if "holds" in row]
    print(f"{sum(row['holds'] for row in rows)} of {len(journal.results)} as planned")
    print(journal.save())


def model(journal: Journal, name: str, kind: Kind, scratch: Path) -> None:
    """Measure one model under every map; its files go at the end."""
    with tempfile.TemporaryDirectory(dir=scratch) as files:
        folder, structure = Path(files), kind.empty()
        write(structure, folder / "checkpoint")
        for number, (about, format, places, budget) in enumerate(maps(structure)):
            pages = folder / f"pages{number}"
            journal.case(
                {"model": name, "map": about},
                lambda f=format, p=places, b=budget, o=pages: measured(
                    kind, f, p, b, folder / "checkpoint", o
                ),  # type: ignore[misc]
                5.0,
            )


if __name__ == "__main__":
    main()
