"""Tokens a second of a Llama-7B-shaped model with everything on the GPU: eager, captured in a CUDA graph, compiled.

    python benchmarks/decode.py [--format nf4] [--layers 32] [--peers FOLDER] [--seconds 200] [--out FOLDER]

Weights are random (normal, 0.02), quantized where they are made; batch 1, a static cache of 512 positions that begins
with 64. *step* is one step of greedy decoding, the token chosen on the device: eager, or captured in a CUDA graph.
*step, small operations compiled* is the captured step with norms, MLP and rotary embedding through ``torch.compile``
(three small graphs, used by all layers). *generate* is transformers' own loop, 64 tokens, eager. A captured step is
timed only if its logits have the bits of the eager one. bf16 and bitsandbytes run the same weights in the same process.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, save
from torch import nn

import tuckaway

SIZES = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
POSITIONS, PROMPT = 512, 64


def empty_model(layers: int, sizes: dict[str, int]) -> Any:
    """Return the model without weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **sizes, num_hidden_layers=layers, num_key_value_heads=sizes["num_attention_heads"], use_cache=True
    )
    config._attn_implementation = "sdpa"
    with tuckaway.init_empty_weights():
        return LlamaForCausalLM(config).eval()


def fill(model: nn.Module, make: Callable[[str, torch.Tensor], torch.Tensor], device: torch.device) -> None:
    """Give every parameter a value: ``make(name, plain)`` of a plain bf16 tensor drawn with the name's own seed."""
    for number, (name, parameter) in enumerate(list(model.named_parameters())):
        generator = torch.Generator(device).manual_seed(number)
        plain = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
        if plain.dim() == 2:
            plain.normal_(0.0, 0.02, generator=generator)
        path, _, leaf = name.rpartition(".")
        made = make(name, plain)
        model.get_submodule(path)._parameters[leaf] = nn.Parameter(made, requires_grad=False)
    for name, buffer in list(model.named_buffers()):
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = buffer.to(device)


class Step:
    """One step of greedy decoding: the token is chosen, and all positions move on, on the device."""

    def __init__(self, model: Any, device: torch.device) -> None:
        from transformers import StaticCache

        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=POSITIONS)
        names = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"  # renamed in transformers 5.24
        self.token = torch.full((1, 1), 7, device=device)
        self.position = torch.full((1, 1), PROMPT, device=device)
        self._forward(
            torch.arange(PROMPT, device=device)[None] % 997, torch.arange(PROMPT, device=device)[None]
        )
        self.reset()

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        options = {self.cache_name: self.cache, "position_ids": positions, "use_cache": True}
        return self.model(input_ids=tokens, logits_to_keep=1, **options).logits  # type: ignore[no-any-return]

    def reset(self) -> None:
        """Go back to the end of the prompt."""
        self.token.fill_(7)
        self.position.fill_(PROMPT)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(PROMPT)

    def __call__(self) -> torch.Tensor:
        """Return the logits ``[1, 1, vocabulary]`` of the next token."""
        logits = self._forward(self.token, self.position)
        self.token.copy_(logits.argmax(-1))
        self.position.add_(1)
        return logits


def captured(step: Step) -> tuple[Any, torch.Tensor]:
    """Return a graph of one step, and where its logits are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    return graph, logits


def after_steps(step: Step, call: Callable[[], Any], logits: torch.Tensor | None) -> torch.Tensor:
    """Return the logits of the fourth token after the prompt."""
    step.reset()
    for _ in range(4):
        result = call()
    return (result if logits is None else logits).clone()


def rate(step: Step, call: Callable[[], Any], seconds: float = 1.5, steps: int = 32) -> float:
    """Return steps a second, the median of several runs from the end of the prompt on."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        step.reset()
        synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            call()
        synchronize()
        times.append((time.perf_counter() - began) / steps)
    return round(1 / sorted(times)[len(times) // 2], 1)


def generate_rate(model: Any, device: torch.device, tokens: int = 48) -> float:
    """Return tokens a second of transformers' own eager loop."""
    prompt = torch.arange(PROMPT, device=device)[None] % 997
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
    ask = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    model.generate(**ask, **{**options, "min_new_tokens": 4, "max_new_tokens": 4})
    began = time.perf_counter()
    model.generate(**ask, **options)
    return round(tokens / (time.perf_counter() - began), 2)


def compile_small_operations(model: Any) -> None:
    """Compile what lies between the products: the classes' forwards, so that all layers share the graphs."""
    modeling = sys.modules[type(model).__module__]
    modeling.LlamaRMSNorm.forward = torch.compile(modeling.LlamaRMSNorm.forward, fullgraph=True)
    modeling.LlamaMLP.forward = torch.compile(modeling.LlamaMLP.forward, fullgraph=True)
    modeling.apply_rotary_pos_emb = torch.compile(modeling.apply_rotary_pos_emb, fullgraph=True)


def measure(name: str, model: Any, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Return every rate of one model."""
    row: dict[str, Any] = {"model": name, "bytes": tuckaway.memory_footprint(model)}
    step = Step(model, device)
    expected = after_steps(step, step, None)
    row["step, eager"] = rate(step, step, steps=8)
    if device.type == "cuda":
        row["generate, eager"] = generate_rate(model, device)
        graph, logits = captured(step)
        row["captured logits equal"] = torch.equal(after_steps(step, graph.replay, logits), expected)
        if row["captured logits equal"]:
            row["step, captured"] = rate(step, graph.replay)
        if compiled:
            compile_small_operations(model)
            graph, logits = captured(step)
            found = after_steps(step, graph.replay, logits).float()
            distance = float((found - expected.float()).norm() / expected.float().norm())
            row["compiled against eager logits"] = distance
            if distance < 5e-2:  # bf16 rounded in other places, 32 layers deep
                row["step, small operations compiled, captured"] = rate(step, graph.replay)
    print(row, flush=True)
    return row


def bitsandbytes_model(layers: int, sizes: dict[str, int], device: torch.device) -> Any:
    """Return the model with bitsandbytes' modules around the same codes."""
    bnb = importlib.import_module("bitsandbytes")
    model = empty_model(layers, sizes)
    fill(model, lambda name, plain: plain, device)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            new = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
            )
            new.weight = bnb.nn.Params4bit(
                module.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
            )
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new.to(device))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--peers", help="folder that bitsandbytes lies unpacked in")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=200.0, help="begin no further model after this long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.peers:
        sys.path.insert(0, options.peers)
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = (
        {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 1000}
        if options.tiny
        else SIZES
    )
    config = tuckaway.QuantizationConfig(format=options.format)

    def quantized(name: str, plain: torch.Tensor) -> torch.Tensor:
        taken = plain.dim() == 2 and "lm_head" not in name and "embed" not in name
        return tuckaway.quantize(plain, config) if taken else plain

    rows = []
    with torch.no_grad():
        if options.peers:
            model = bitsandbytes_model(options.layers, sizes, device)
            rows.append({"model": "bitsandbytes nf4 nested", "generate, eager": generate_rate(model, device)})
            print(rows[-1], flush=True)
            del model
        for name, make in (("bf16", lambda name, plain: plain), (f"{options.format} nested", quantized)):
            if time.monotonic() - began > options.seconds:
                break
            model = empty_model(options.layers, sizes)
            fill(model, make, device)
            last = name != "bf16"  # compiled operations stay compiled: only for the last model
            rows.append(measure(name, model, device, last and not options.no_compile))
            del model
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(save(f"decode_{options.format}", rows, options.out))


if __name__ == "__main__":
    main()
