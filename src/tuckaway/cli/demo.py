"""``tuckaway demo``: a real language model, quantized, spread over all memory there is, answering a prompt."""

from __future__ import annotations

import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

import tuckaway
from tuckaway.cli.show import Screen, megabytes, name_runs
from tuckaway.cli.smollm2 import REPOSITORY, smollm2
from tuckaway.errors import ConfigError
from tuckaway.plan import choose_specs, tied_groups

__all__ = ["default_budget", "parse_max_memory", "run_demo"]

_RESIDENT_SHARE = 0.4
"""Part of the blocks that the default budget leaves room for on the executing device."""
_RAM_SHARE = 0.3
"""The same for RAM, where a GPU executes; the rest goes to disk."""


def run_demo(
    *,
    format: str,
    max_memory: str | None,
    prompt: str,
    model: str | None,
    max_new_tokens: int,
    screen: Screen | None = None,
) -> None:
    """Load a model as small as asked, show where it lies, and print its answer token by token.

    Args:
        format: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        max_memory: as :func:`parse_max_memory` reads it; ``None``: :func:`default_budget`.
        prompt: what the model is asked, through its chat template where it has one.
        model: Hub id or folder of a causal language model; ``None``: SmolLM2-135M-Instruct.
        max_new_tokens: tokens of the answer, at most.
        screen: where to print.

    Raises:
        TuckawayError: the model cannot be had, or does not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    screen = screen or Screen()
    budget = None if max_memory is None else parse_max_memory(max_memory)
    source = model if model is not None else str(smollm2())
    # A GPU computes in bf16 at twice the speed; a CPU without bf16 units is slower in it than in fp32.
    compute_dtype = torch.bfloat16 if torch.accelerator.is_available() else torch.float32
    config = tuckaway.QuantizationConfig(format=format, compute_dtype=compute_dtype)

    architecture = AutoConfig.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    with tuckaway.init_empty_weights():
        network: Any = AutoModelForCausalLM.from_config(architecture)
    network.eval()
    network.tie_weights()
    sizes = _Sizes.of(network, config)
    screen.line(
        f"{model or REPOSITORY}: {sizes.parameters / 1e6:,.1f} million parameters, built empty; {source}"
    )

    before = _process_bytes(), _accelerator_bytes()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tuckaway-demo-") as offload_folder:
        network = tuckaway.load_and_quantize_model(
            network,
            config,
            weights_location=source,
            device_map="auto",
            max_memory=budget if budget is not None else default_budget(sizes),
            no_split_module_classes=network._no_split_modules,
            offload_folder=offload_folder,
        )
        seconds = time.perf_counter() - began
        _show_placement(screen, network.hf_device_map, sizes)
        _show_memory(screen, sizes, config, before, seconds)
        _answer(screen, network, tokenizer, prompt, max_new_tokens)


def parse_max_memory(text: str) -> dict[int | str, str]:
    """Read memory by device as the command line has it.

    Raises:
        ConfigError: it is no list of ``DEVICE=SIZE``.

    Example:
        >>> parse_max_memory("0=100MB,cpu=40MB")
        {0: '100MB', 'cpu': '40MB'}
    """
    result: dict[int | str, str] = {}
    for item in text.split(","):
        found = re.fullmatch(r"\s*(\d+|cpu)\s*=\s*(\d+(?:\.\d+)?\s*[KMGT]?i?B)\s*", item, re.IGNORECASE)
        if found is None:
            raise ConfigError(
                f"{item.strip()!r} is no DEVICE=SIZE", hint="write --max-memory '0=100MB,cpu=40MB'"
            )
        device = found[1].lower()
        result[int(device) if device.isdigit() else device] = found[2].replace(" ", "")
    return result


@dataclass(frozen=True)
class _Sizes:
    """Exact bytes of a model in its final form, before anything is loaded.

    Args:
        parameters: number of weights, tied ones once.
        full_bytes: the parameters in fp32.
        of_tensor: bytes of every parameter and buffer; a tied one under its first name alone.
        blocks: names of the modules that may not be split: the decoder layers.
    """

    parameters: int
    full_bytes: int
    of_tensor: Mapping[str, int]
    blocks: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, config: tuckaway.QuantizationConfig) -> _Sizes:
        specs, _ = choose_specs(model, config)
        repeated = {name for group in tied_groups(model) for name in list(group)[1:]}
        parameters = sum(p.numel() for p in model.parameters())
        whole = set(getattr(model, "_no_split_modules", None) or ())
        return cls(
            parameters=parameters,
            full_bytes=4 * parameters,
            of_tensor={name: spec.nbytes for name, spec in specs.items() if name not in repeated},
            blocks=tuple(name for name, module in model.named_modules() if type(module).__name__ in whole),
        )

    def under(self, module: str) -> int:
        """Bytes of everything below a module."""
        return sum(n for name, n in self.of_tensor.items() if not module or name.startswith(f"{module}."))


def default_budget(sizes: _Sizes) -> dict[int | str, int]:
    """Return a ``max_memory`` under which every kind of placement is in use.

    The executing device gets what is no decoder layer (the embedding, mostly), the two slots that blocks are paged
    into, and room for two fifths of the blocks. Under a GPU, RAM has room for three tenths. The rest goes to disk.
    """
    blocks = [sizes.under(name) for name in sizes.blocks]
    rest = sizes.under("") - sum(blocks)
    resident = rest + 2 * max(blocks, default=0) + int(_RESIDENT_SHARE * sum(blocks))
    if torch.accelerator.is_available():
        return {0: resident, "cpu": int(_RAM_SHARE * sum(blocks))}
    return {"cpu": resident}


def _show_placement(screen: Screen, device_map: Mapping[str, Any], sizes: _Sizes) -> None:
    by_place: defaultdict[str, list[str]] = defaultdict(list)
    for module, place in device_map.items():
        by_place[str(place)].append(module)
    gpu = torch.accelerator.is_available()
    meaning = {
        "cpu": "RAM (cpu), paged to the GPU for its turn" if gpu else "RAM (cpu), resident",
        "disk": f"disk, paged to {'the GPU' if gpu else 'RAM'} for its turn",
    }
    rows = [
        (
            meaning.get(place, f"GPU {place}, resident"),
            name_runs(modules) or "everything",
            megabytes(sum(sizes.under(module) for module in modules)),
        )
        for place, modules in by_place.items()
    ]
    screen.line()
    screen.table("Where everything went", ("placement", "blocks", "size"), rows)


def _show_memory(
    screen: Screen,
    sizes: _Sizes,
    config: tuckaway.QuantizationConfig,
    before: tuple[int, int],
    seconds: float,
) -> None:
    other = str(config.plain_dtype).removeprefix("torch.")
    rows = [
        ("weights in fp32", megabytes(sizes.full_bytes)),
        (f"weights in {config.format}, embeddings and norms in {other}", megabytes(sizes.under(""))),
        ("private memory of this process before loading", megabytes(before[0])),
        ("private memory of this process after loading", megabytes(_process_bytes())),
    ]
    if torch.accelerator.is_available():
        rows += [
            ("GPU memory before loading", megabytes(before[1])),
            ("GPU memory after loading", megabytes(_accelerator_bytes())),
        ]
    screen.line()
    screen.table(f"Memory; loaded and quantized in {seconds:.1f} s", ("what", "size"), rows)


def _process_bytes() -> int:
    return int(psutil.Process().memory_full_info().uss)


def _accelerator_bytes() -> int:
    return torch.accelerator.memory_allocated() if torch.accelerator.is_available() else 0


def _answer(screen: Screen, model: Any, tokenizer: Any, prompt: str, limit: int) -> None:
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    screen.line()
    screen.line(f"> {prompt}", style="bold")
    shown, tokens, times = "", [], [time.perf_counter()]
    for token in _greedy(model, encoded["input_ids"], limit):
        tokens.append(token)
        times.append(time.perf_counter())
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith(
            "\N{REPLACEMENT CHARACTER}"
        ):  # else: a character whose bytes are not all there yet
            screen.piece(text[len(shown) :])
            shown = text
    screen.line()
    screen.line()
    if len(times) > 2:
        rate = (len(times) - 2) / (times[-1] - times[1])
        first = times[1] - times[0]
        screen.line(
            f"{len(tokens)} tokens, {rate:.1f} tokens/s (the first, with the prompt, after {first:.2f} s)"
        )


@torch.no_grad()
def _greedy(model: Any, tokens: torch.Tensor, limit: int) -> Iterator[int]:
    """Yield the likeliest next token, again and again.

    Args:
        model: a causal language model of transformers.
        tokens: int64 ``[1, T]``, the prompt.
        limit: tokens to yield at most; an end-of-sequence token ends it earlier.
    """
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    cache = None
    for _ in range(limit):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tokens = output.logits[:, -1:].argmax(-1)
        token = int(tokens)
        if token in ends:
            return
        yield token
