"""What others do with layers that are not on the GPU; run by ``paging.py``, each in a process of its own.

    python benchmarks/paging_peers.py "accelerate, bf16" [--layers 32] [--tokens 2] [--miniature] [--peers FOLDER]

Weights are drawn where they are computed with and then put into RAM, so that no checkpoint is written or read. Half a
token a second is what most of them reach: two tokens are timed, after one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from decode import MINIATURE, SIZES, bitsandbytes_model, empty_model, fill
from timing import device as the_device
from timing import synchronize

import tuckaway

TOKEN = 7


def place() -> int | str:
    """Return the GPU as a device map has it, or the CPU where there is none."""
    return 0 if torch.cuda.is_available() else "cpu"


def made(options: argparse.Namespace, format: str | None) -> Any:
    """Return the model with drawn weights, in bf16 or quantized where they are drawn."""
    sizes = MINIATURE if options.miniature else SIZES
    config = None if format is None else tuckaway.QuantizationConfig(format=format, compute_dtype="bf16")

    def make(name: str, plain: torch.Tensor) -> torch.Tensor:
        taken = config is not None and plain.dim() == 2 and "lm_head" not in name and "embed" not in name
        return tuckaway.quantize(plain, config) if taken and config is not None else plain

    model = empty_model(options.layers, sizes)
    fill(model, make, the_device())
    return model


def device_map(model: Any, away: str) -> dict[str, int | str]:
    """Return a map with all layers ``away`` and everything else where it is computed."""
    around = ("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb")
    return {
        **dict.fromkeys(around, place()),
        **{f"model.layers.{i}": away for i in range(len(model.model.layers))},
    }


def with_hooks(model: Any) -> None:
    """Put the layers into RAM and let accelerate bring each weight when its module is called."""
    from accelerate import dispatch_model

    model.model.layers.to("cpu")
    dispatch_model(model, device_map(model, "cpu"), main_device=place(), force_hooks=True)


def accelerate_bf16(options: argparse.Namespace) -> Any:
    """Hooks of accelerate on bf16 weights, which transformers + bitsandbytes leaves offloaded layers in too."""
    model = made(options, None)
    with_hooks(model)
    return model


def accelerate_bitsandbytes(options: argparse.Namespace) -> Any:
    """Hooks of accelerate on bitsandbytes' quantized layers, as far as it takes them."""
    ours = made(options, "nf4")
    sizes = MINIATURE if options.miniature else SIZES
    model = bitsandbytes_model(ours, options.layers, sizes, the_device())
    del ours
    with_hooks(model)
    return model


def group_offload(options: argparse.Namespace) -> Any:
    """Group offload, as diffusers has it, of bf16 weights: a layer at a time, the next one copied meanwhile.

    The embedding and the last norm are a group of their own, which it brings for every token too.
    """
    from diffusers.hooks import apply_group_offloading

    model, gpu = made(options, None), torch.cuda.is_available()
    apply_group_offloading(
        model.model,
        onload_device=the_device(),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=gpu,
        non_blocking=gpu,
    )
    return model


PEERS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "accelerate, bf16": accelerate_bf16,
    "accelerate + bitsandbytes, nf4": accelerate_bitsandbytes,
    "diffusers group offload, bf16": group_offload,
}
"""What is measured, the most wanted first."""

NEEDS = {"accelerate + bitsandbytes, nf4": "bitsandbytes", "diffusers group offload, bf16": "diffusers"}
"""Packages that one needs."""


def tokens_a_second(model: Any, count: int) -> float:
    """Return tokens a second of eager steps without a cache, whose time is the transfer's."""
    token = torch.full((1, 1), TOKEN, device=the_device())
    with torch.no_grad():
        model(token, use_cache=False)
        synchronize()
        began = time.perf_counter()
        for _ in range(count):
            model(token, use_cache=False)
        synchronize()
    return round(count / (time.perf_counter() - began), 4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2)
    parser.add_argument("--miniature", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--peers", help="folder that packages of peers lie unpacked in")
    options = parser.parse_args()
    if options.peers:
        sys.path.append(options.peers)
    began = time.perf_counter()
    model = PEERS[options.peer](options)
    synchronize()
    built = round(time.perf_counter() - began, 1)
    print(
        "RESULT "
        + json.dumps({"built_in_s": built, "eager_tokens_s": tokens_a_second(model, options.tokens)})
    )


if __name__ == "__main__":
    main()
