"""Tokens a second of a Llama-7B-shaped model with everything on the GPU: eager, captured in a CUDA graph, compiled.

    python benchmarks/decode.py [--format nf4] [--layers 32] [--peers FOLDER] [--budget 200] [--miniature]

Weights are random (normal, 0.02), quantized where they are made; batch 1, a static cache of 512 positions that begins
with 64. *step* is one step of greedy decoding, the token chosen on the device: eager, or captured in a CUDA graph.
*small operations compiled* is the captured step with norms, MLP and rotary embedding through ``torch.compile``
(three small graphs, used by all layers), *layers compiled* that with each decoder layer whole. *generate* is
transformers' own loop, 32 tokens, eager, the median of five. A captured step is timed only if its logits have the bits
of the eager one, a compiled one if they are no farther from those with activations in fp32. bitsandbytes runs on the
very bytes that tuckaway quantized, bf16 on weights drawn with the same seeds, in the same process.

Every figure is a result of its own, written when it is known, the most wanted first. ``--miniature`` tries all cases on
a small model, on a CPU too, where nothing is captured.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Journal
from timing import device as the_device
from timing import synchronize
from torch import nn

import tuckaway
from tuckaway.formats import format_of

SIZES = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
MINIATURE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 1000}
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


@contextmanager
def repeatable_attention() -> Iterator[None]:
    """Attend by what gives the same bits every time: cuDNN's attention, torch's choice on an H100, does not."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


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
    """Return the logits of the fourth token after the prompt.

    The tokens before it are given: the model's own choices are near ties, its weights being random.
    """
    step.reset()
    for number in range(4):
        step.token.fill_(100 + 17 * number)
        result = call()
    return (result if logits is None else logits).clone()


def rate(step: Step, call: Callable[[], Any], seconds: float = 1.5, steps: int = 32) -> float:
    """Return steps a second, the median of several runs from the end of the prompt on."""
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


def generate_rate(model: Any, device: torch.device, tokens: int = 32, runs: int = 5) -> dict[str, Any]:
    """Return tokens a second of transformers' own eager loop: the median, and every run."""
    prompt = torch.arange(PROMPT, device=device)[None] % 997
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
    ask = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    model.generate(**ask, **options)
    rates = []
    for _ in range(runs):
        synchronize()
        began = time.perf_counter()
        model.generate(**ask, **options)
        synchronize()
        rates.append(round(tokens / (time.perf_counter() - began), 2))
    return {"tokens_s": statistics.median(rates), "runs": rates}


@contextmanager
def small_operations_compiled(model: Any) -> Iterator[None]:
    """Compile what lies between the products: the classes' forwards, so that all layers share the graphs."""
    modeling: Any = sys.modules[type(model).__module__]
    norm, mlp, rotate = modeling.LlamaRMSNorm, modeling.LlamaMLP, modeling.apply_rotary_pos_emb
    before = norm.forward, mlp.forward
    try:
        norm.forward = torch.compile(norm.forward, fullgraph=True)
        mlp.forward = torch.compile(mlp.forward, fullgraph=True)
        modeling.apply_rotary_pos_emb = torch.compile(rotate, fullgraph=True)
        yield
    finally:
        norm.forward, mlp.forward = before
        modeling.apply_rotary_pos_emb = rotate


@contextmanager
def layers_compiled(model: Any) -> Iterator[None]:
    """Compile every decoder layer; the graphs differ in which cache they write, and Inductor finds them in its own."""
    layers = list(model.model.layers)
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    try:
        torch._dynamo.config.recompile_limit = 4 * len(layers)
        torch._dynamo.config.accumulated_recompile_limit = 16 * len(layers)
        for layer in layers:
            layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
        torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = limits
        torch._dynamo.reset()


class Bench:
    """One model and its figures."""

    def __init__(self, journal: Journal, name: str, model: Any, device: torch.device, seconds: float) -> None:
        self.journal, self.name, self.model, self.device = journal, name, model, device
        self.seconds = seconds
        self.step = Step(model, device)
        self.eager = after_steps(self.step, self.step, None)
        with repeatable_attention():
            self.expected = after_steps(self.step, self.step, None)
        self.exact = self._exact()

    def _exact(self) -> torch.Tensor:
        """Return the logits of the fourth token with everything but the quantized weights in fp32."""
        plain = [p for p in self.model.parameters() if not isinstance(p, tuckaway.QuantizedTensor)]
        before = [p.data for p in plain]
        try:
            for p in plain:
                p.data = p.data.float()
            step = Step(self.model, self.device)
            return after_steps(step, step, None)
        finally:
            for p, data in zip(plain, before, strict=True):
                p.data = data

    def case(self, what: str, measure: Callable[[], dict[str, Any]], needs: float) -> None:
        """Record one figure."""
        began = time.monotonic()

        def timed() -> dict[str, Any]:
            return measure() | {"measured_in_s": round(time.monotonic() - began, 1)}

        self.journal.case({"model": self.name, "what": what}, timed, needs)

    def captured(self) -> dict[str, Any]:
        """Capture the step and compare all bits; then time it, with the attention that torch chooses."""
        with repeatable_attention():
            found = after_steps(self.step, *self._graph())
        if not torch.equal(found, self.expected):
            return {"wrong": True, "error": self._error(found)}
        return {"tokens_s": rate(self.step, self._graph()[0], self.seconds)}

    def compiled(self, compiling: Callable[[Any], Any]) -> dict[str, Any]:
        """Capture the step as ``compiling`` changes it, compare the logits, time it."""
        began = time.monotonic()
        with compiling(self.model):
            call, logits = self._graph()
            row: dict[str, Any] = {"compiled_in_s": round(time.monotonic() - began, 1)}
            row["error"] = self._error(after_steps(self.step, call, logits))
            row["error_uncompiled"] = self._error(self.eager)
            if not row["error"] < 1.2 * row["error_uncompiled"]:  # bf16 is rounded in other places
                return row | {"wrong": True}
            return row | {"tokens_s": rate(self.step, call, self.seconds)}

    def _graph(self) -> tuple[Callable[[], Any], torch.Tensor | None]:
        if self.device.type != "cuda":
            return self.step, None
        graph, logits = captured(self.step)
        return graph.replay, logits

    def _error(self, found: torch.Tensor) -> float:
        return float((found.float() - self.exact).norm() / self.exact.norm())

    def plain_cases(self) -> None:
        """Measure the captured step, transformers' own loop, and the eager step."""
        self.case("step, captured", self.captured, 10.0)
        self.case("generate, eager", lambda: generate_rate(self.model, self.device), 8.0)
        self.case("step, eager", lambda: {"tokens_s": rate(self.step, self.step, self.seconds, steps=8)}, 3.0)

    def compiled_cases(self) -> None:
        """Measure the captured step with more and less of it compiled."""
        small = "step, small operations compiled, captured"
        self.case(small, lambda: self.compiled(small_operations_compiled), 25.0)
        self.case("step, layers compiled, captured", lambda: self.compiled(layers_compiled), 40.0)


def bitsandbytes_model(ours: Any, layers: int, sizes: dict[str, int], device: torch.device) -> Any:
    """Return the model with bitsandbytes' modules on the bytes of ``ours``: no weight is drawn or quantized again."""
    bnb = importlib.import_module("bitsandbytes")
    model = empty_model(layers, sizes)
    for name, parameter in list(ours.named_parameters()):
        path, _, leaf = name.rpartition(".")
        if not isinstance(parameter, tuckaway.QuantizedTensor):
            model.get_submodule(path)._parameters[leaf] = parameter
            continue
        layout = parameter.layout_info
        stored = format_of(layout.format).serialize("weight", parameter.components, layout)
        new = bnb.nn.Linear4bit(
            layout.cols,
            layout.rows,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=layout.nested,
            quant_type=layout.format,
            device="meta",  # values drawn for all layers take a CPU a minute
        )
        codes = stored.pop("weight")
        statistics_ = {key.removeprefix("weight."): value for key, value in stored.items()}
        new.weight = bnb.nn.Params4bit.from_prequantized(codes, statistics_, device=device, module=new)
        parent, _, own = path.rpartition(".")
        setattr(model.get_submodule(parent), own, new)
    for name, buffer in ours.named_buffers():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = buffer
    return model


def _seconds(options: argparse.Namespace) -> float:
    return 0.2 if options.miniature else 1.5


def quantized_cases(journal: Journal, options: argparse.Namespace, sizes: dict[str, int]) -> None:
    """Measure the quantized model, and bitsandbytes' on its bytes."""
    device, layers = the_device(), options.layers
    config = tuckaway.QuantizationConfig(format=options.format)

    def quantized(name: str, plain: torch.Tensor) -> torch.Tensor:
        taken = plain.dim() == 2 and "lm_head" not in name and "embed" not in name
        return tuckaway.quantize(plain, config) if taken else plain

    ours = empty_model(layers, sizes)
    fill(ours, quantized, device)
    name = options.format + " nested" * (options.format != "int8")
    bench = Bench(journal, name, ours, device, _seconds(options))
    bench.plain_cases()

    def peer() -> dict[str, Any]:
        began = time.monotonic()
        model = bitsandbytes_model(ours, layers, sizes, device)
        built = round(time.monotonic() - began, 1)
        return {"built_in_s": built} | generate_rate(model, device)

    if options.format != "int8" and (options.peers or options.miniature):
        journal.case({"model": f"bitsandbytes {name}", "what": "generate, eager"}, peer, 15.0)
    if not options.no_compile:
        bench.compiled_cases()


def bf16_cases(journal: Journal, options: argparse.Namespace, sizes: dict[str, int]) -> None:
    """Measure the same model in bf16."""
    if the_device().type == "cuda":
        torch.cuda.empty_cache()
    model = empty_model(options.layers, sizes)
    fill(model, lambda name, plain: plain, the_device())
    Bench(journal, "bf16", model, the_device(), _seconds(options)).plain_cases()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--miniature", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--peers", help="folder that bitsandbytes lies unpacked in")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--budget", type=float, default=200.0, help="seconds; then nothing more is begun")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.peers:
        sys.path.insert(0, options.peers)
    journal = Journal(f"decode_{options.format}", options.budget, options.out)
    with torch.no_grad():
        sizes = MINIATURE if options.miniature else SIZES
        quantized_cases(journal, options, sizes)
        if journal.left() > 20.0:
            bf16_cases(journal, options, sizes)
    print(journal.save())


if __name__ == "__main__":
    main()
