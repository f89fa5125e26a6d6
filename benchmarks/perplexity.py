"""Perplexity of a real language model in every format, beside the same weights through bitsandbytes' numbers.

    python benchmarks/perplexity.py MODEL_FOLDER TEXT_FILE [--tokens 20480] [--out FOLDER]

fp32 arithmetic, windows of 1,024 tokens; the projections of every layer are quantized, the embedding and the head
tied to it are not. "bitsandbytes" is the model whose weights went through bitsandbytes' own quantize and dequantize;
with "threshold 6" it is their own modules. All runs on the GPU where there is one (`perplexity_gpu.json`).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, save
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tuckaway
from tuckaway import QuantizationConfig

WINDOW = 1024
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def ours(folder: Path, **options: Any) -> torch.nn.Module:
    with tuckaway.init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    config = QuantizationConfig(compute_dtype=torch.float32, **options)
    return tuckaway.load_and_quantize_model(model, config, weights_location=folder)


def through(folder: Path, function: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.nn.Module:
    """Return the plain model, the weights of its projections replaced by ``function`` of them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    if function is not None:
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and name != "lm_head":
                    module.weight.copy_(function(module.weight))
    return model


def bitsandbytes_4bit(format: str, nested: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    import bitsandbytes.functional as bnb

    def function(weight: torch.Tensor) -> torch.Tensor:
        codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=format, compress_statistics=nested)
        return bnb.dequantize_4bit(codes, state)

    return function


def bitsandbytes_int8(weight: torch.Tensor) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    return codes.float() * (scales.view(-1, 1) * (1 / 127))


def llm_int8(folder: Path) -> torch.nn.Module:
    """Return the model with bitsandbytes' own LLM.int8() modules in place of the projections."""
    import bitsandbytes as bnb

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            new = bnb.nn.Linear8bitLt(
                module.in_features, module.out_features, bias=False, has_fp16_weights=False, threshold=6.0
            )
            new.weight = bnb.nn.Int8Params(module.weight.half(), requires_grad=False, has_fp16_weights=False)
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, new.to(DEVICE))
    return model.to(DEVICE)


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Return exp of the mean cross-entropy over windows, each predicted from its own beginning."""
    model.eval()
    total, count = 0.0, 0
    for window in tokens.to(DEVICE).split(WINDOW):
        if len(window) < 2:
            continue
        logits = model(window[None]).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--peers", help="folder that bitsandbytes lies unpacked in")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.peers:
        sys.path.insert(0, options.peers)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    tokens = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8"))["input_ids"][: options.tokens])
    folder = options.folder
    models: dict[str, Callable[[], torch.nn.Module]] = {
        "fp32": lambda: through(folder, None),
        "int8 / bitsandbytes": lambda: through(folder, bitsandbytes_int8),
        "int8 / tuckaway, weight-only": lambda: ours(folder, format="int8", int8_threshold=None),
        "int8 / bitsandbytes, threshold 6": lambda: llm_int8(folder),
        "int8 / tuckaway, threshold 6": lambda: ours(folder, format="int8", int8_threshold=6.0),
        "nf4 / bitsandbytes": lambda: through(folder, bitsandbytes_4bit("nf4", False)),
        "nf4 / tuckaway": lambda: ours(folder, format="nf4", nested=False),
        "nf4 nested / bitsandbytes": lambda: through(folder, bitsandbytes_4bit("nf4", True)),
        "nf4 nested / tuckaway": lambda: ours(folder, format="nf4", nested=True),
        "fp4 / bitsandbytes": lambda: through(folder, bitsandbytes_4bit("fp4", False)),
        "fp4 / tuckaway": lambda: ours(folder, format="fp4", nested=False),
    }
    results = {}
    for name, make in models.items():
        if options.only is None or any(word in name for word in options.only):
            results[name] = round(perplexity(make(), tokens), 4)
            print(f"{name:32} {results[name]:8.4f}", flush=True)
    name = "perplexity" if DEVICE == "cpu" else "perplexity_gpu"
    print(save(name, {"tokens": len(tokens), "window": WINDOW, "perplexity": results}, options.out))


if __name__ == "__main__":
    main()
