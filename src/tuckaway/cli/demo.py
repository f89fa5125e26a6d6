"""``tuckaway demo``: a real language model, quantized, spread over all memory there is, answering a prompt."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch

import tuckaway
from tuckaway.cli.answer import answer
from tuckaway.cli.show import Screen, name_runs
from tuckaway.cli.smollm2 import REPOSITORY, smollm2
from tuckaway.errors import CheckpointNotFound, ConfigError
from tuckaway.plan import choose_specs, compute_module_sizes, format_bytes, parse_bytes

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
    # GPUs compute in bf16 fastest; CPUs, at the batch of one that an answer is, in fp32
    compute_dtype = torch.bfloat16 if torch.accelerator.is_available() else torch.float32
    config = tuckaway.QuantizationConfig(format=format, compute_dtype=compute_dtype)

    try:
        architecture = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:  # what transformers raises for a folder or Hub id it cannot read
        first = str(error).partition("\n")[0].rstrip(".")
        raise CheckpointNotFound(
            first, where=source, hint="name a folder or a Hub id with --model"
        ) from error
    with tuckaway.init_empty_weights():
        network: Any = AutoModelForCausalLM.from_config(architecture)
    network.eval()
    network.tie_weights()
    parameters = sum(p.numel() for p in network.parameters())
    screen.line(
        f"{model or REPOSITORY}: {parameters / 1e6:,.1f} million parameters, built empty", style="bold"
    )
    screen.line(f"weights from {source}")
    whole = set(network._no_split_modules or ())
    blocks = [name for name, module in network.named_modules() if type(module).__name__ in whole]
    if budget is None:
        specs, _ = choose_specs(network, config)
        budget = default_budget(compute_module_sizes(network, specs=specs), blocks)

    before = _memory()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tuckaway-demo-") as offload_folder:
        network = tuckaway.load_and_quantize_model(
            network,
            config,
            weights_location=source,
            device_map="auto",
            max_memory=budget,
            no_split_module_classes=sorted(whole),
            offload_folder=offload_folder,
        )
        seconds = time.perf_counter() - began
        _show_placement(screen, network)
        _show_memory(screen, network, 4 * parameters, before, seconds)
        answer(screen, network, tokenizer, prompt, max_new_tokens)


def parse_max_memory(text: str) -> dict[int | str, int | str]:
    """Read memory by device as the command line has it.

    Raises:
        ConfigError: it is no list of ``DEVICE=SIZE``.
        PlanError: a size that is none.

    Example:
        >>> parse_max_memory("0=100MB,cpu=1.5GiB")
        {0: 100000000, 'cpu': 1610612736}
    """
    result: dict[int | str, int | str] = {}
    for item in text.split(","):
        device, _, size = item.strip().partition("=")
        if not (device.isdigit() or device in ("cpu", "disk", "mps")) or not size:
            raise ConfigError(
                f"{item.strip()!r} is no DEVICE=SIZE", hint="write --max-memory 0=100MB,cpu=40MB"
            )
        result[int(device) if device.isdigit() else device] = parse_bytes(size)
    return result


def default_budget(sizes: Mapping[str, int], blocks: Sequence[str]) -> dict[int | str, int | str]:
    """Return a ``max_memory`` under which every kind of placement is in use.

    The executing device gets what is no block (the embedding, mostly), the two slots that blocks are paged into, and
    room for two fifths of the blocks. Under a GPU, RAM has room for three tenths. The rest goes to disk.

    Args:
        sizes: final bytes by module; ``""`` is the whole model.
        blocks: names of the modules that may not be split.
    """
    each = [sizes[name] for name in blocks]
    resident = sizes[""] - sum(each) + 2 * max(each, default=0) + int(_RESIDENT_SHARE * sum(each))
    if torch.accelerator.is_available():
        return {0: resident, "cpu": int(_RAM_SHARE * sum(each))}
    return {"cpu": resident}


def _show_placement(screen: Screen, model: Any) -> None:
    modules: defaultdict[int | str, list[str]] = defaultdict(list)
    for name, place in model.hf_device_map.items():
        modules[place].append(name or "everything")
    gpu = torch.accelerator.is_available()
    meaning = {
        "cpu": "RAM, paged to the GPU for its turn" if gpu else "RAM, resident",
        "disk": f"disk, paged to {'the GPU' if gpu else 'RAM'} for its turn",
    }
    rows = [
        (
            str(place),
            meaning.get(str(place), "GPU, resident"),
            name_runs(modules[place]),
            format_bytes(nbytes),
        )
        for place, nbytes in model.quantization_report.bytes_by_device().items()
    ]
    screen.line()
    screen.table("Where everything went", ("on", "which is", "modules", "size"), rows)


def _show_memory(screen: Screen, model: Any, full: int, before: tuple[int, int], seconds: float) -> None:
    formats = model.quantization_report.bytes_by_format().items()
    process, accelerator = _memory()
    rows = [
        ("weights in fp32", format_bytes(full)),
        ("weights now: " + ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in formats),
         format_bytes(tuckaway.memory_footprint(model))),
        ("private memory of this process before loading", format_bytes(before[0])),
        ("private memory of this process after loading", format_bytes(process)),
    ]  # fmt: skip
    if torch.accelerator.is_available():
        rows.append(("GPU memory before loading", format_bytes(before[1])))
        rows.append(("GPU memory after loading", format_bytes(accelerator)))
    screen.line()
    screen.table(f"Memory; read, quantized and placed in {seconds:.1f} s", ("what", "size"), rows)


def _memory() -> tuple[int, int]:
    """Bytes that this process has for itself, and bytes of tensors on the accelerator."""
    private = int(psutil.Process().memory_full_info().uss)
    return private, torch.accelerator.memory_allocated() if torch.accelerator.is_available() else 0
