"""Does an adapter on a quantized base learn as it does on the same base dequantized? Two losses a step.

    python -m benchmarks.lora --picture docs/pictures/lora.svg  # SmolLM2-135M, nf4 and int8, 100 steps each
    python -m benchmarks.lora --steps 20 --context 32 --format nf4

Both runs have the same weights (those of the quantized base), the same adapter to begin with, and see the same text in
the same order; what differs is the arithmetic of the base alone. ``largest`` is the largest relative difference of the
loss at one step; ``smoothed`` that of means over ten steps.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import RESULTS, save
from peft import LoraConfig, get_peft_model
from tests.corpus import prose
from transformers import AutoTokenizer

import tuckaway
from tuckaway.cli.smollm2 import smollm2

_WINDOW = 10


def batches(folder: Path, steps: int, batch: int, context: int) -> list[torch.Tensor]:
    tokens = AutoTokenizer.from_pretrained(folder)(prose(8 * steps * batch * context))["input_ids"]
    rows = torch.tensor(tokens[: steps * batch * context]).view(steps, batch, context)
    return list(rows)


def load(folder: Path, format: str) -> Any:
    # int8_threshold is the default 6.0: LLM.int8(), whose products round the inputs too
    config = tuckaway.QuantizationConfig(format, compute_dtype=torch.float32)
    return tuckaway.from_pretrained(folder, quantization_config=config, dtype=torch.float32, progress=False)


def train(base: Any, rows: list[torch.Tensor]) -> tuple[list[float], float]:
    """Train an adapter and return the loss of every step, and seconds a step."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    model = get_peft_model(base, LoraConfig(**options)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    begin = time.perf_counter()
    for row in rows:
        loss = model(input_ids=row, labels=row).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, (time.perf_counter() - begin) / len(rows)


def compare(quantized: list[float], plain: list[float]) -> dict[str, float]:
    a, b = torch.tensor(quantized), torch.tensor(plain)
    smooth_a, smooth_b = (t.unfold(0, min(_WINDOW, len(t)), 1).mean(1) for t in (a, b))
    return {
        "largest": float(((a - b) / b).abs().max()),
        "smoothed": float(((smooth_a - smooth_b) / smooth_b).abs().max()),
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the curves, means over ten steps: quantized in colour, dequantized as dots."""
    width, height, left, top = 640, 300, 50, 16
    curves = {
        (name, kind): torch.tensor(run[kind]).unfold(0, min(_WINDOW, len(run[kind])), 1).mean(1).tolist()
        for name, run in results.items()
        for kind in ("quantized", "dequantized")
    }
    low = min(min(curve) for curve in curves.values())
    high = max(max(curve) for curve in curves.values())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12" fill="#57606a"><rect width="100%" height="100%" fill="white"/>'
        "<title>Loss by step of adapters on quantized bases and on the same bases dequantized</title>"
    ]
    for step in range(5):
        value = low + (high - low) * step / 4
        y = height - 40 - (height - 40 - top) * step / 4
        parts.append(
            f'<path d="M{left} {y:.1f}H{width - 10}" stroke="#d0d7de"/><text x="8" y="{y + 4:.1f}">{value:.2f}</text>'
        )
    colours = {"nf4": "#0969da", "int8": "#bf3989"}
    for (name, kind), curve in curves.items():
        points = " ".join(
            f"{left + (width - left - 10) * i / max(len(curve) - 1, 1):.1f},"
            f"{height - 40 - (height - 40 - top) * (value - low) / max(high - low, 1e-9):.1f}"
            for i, value in enumerate(curve)
        )
        style = 'stroke-width="2"' if kind == "quantized" else 'stroke-width="5" stroke-opacity="0.3"'
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colours.get(name, "#1a7f37")}" {style}/>'
        )
    for number, name in enumerate(results):
        colour = colours.get(name, "#1a7f37")
        parts.append(f'<text x="{left + 50 * number}" y="{height - 12}" fill="{colour}">{name}</text>')
    legend = "thin: quantized base; wide: the same dequantized; loss by step"
    parts.append(f'<text x="{left + 50 * len(results) + 10}" y="{height - 12}">{legend}</text>')
    path.write_text("".join(parts) + "</svg>\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", nargs="+", default=["nf4", "int8"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    folder = smollm2()
    rows = batches(folder, arguments.steps, arguments.batch, arguments.context)
    results: dict[str, Any] = {}
    for format in arguments.format:
        quantized, seconds = train(load(folder, format), rows)
        plain, plain_seconds = train(load(folder, format).dequantize(), rows)
        results[format] = {
            **compare(quantized, plain),
            "seconds_a_step": round(seconds, 3),
            "seconds_a_step_dequantized": round(plain_seconds, 3),
            "batch": [arguments.batch, arguments.context],
            "quantized": [round(value, 5) for value in quantized],
            "dequantized": [round(value, 5) for value in plain],
        }
        print(format, {key: value for key, value in results[format].items() if not isinstance(value, list)})
    print(save("lora", results, arguments.out))
    if arguments.picture:
        draw(results, arguments.picture)


if __name__ == "__main__":
    main()
