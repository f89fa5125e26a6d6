"""Host memory while loading a checkpoint to nf4 on the CPU, by shard size.

    python benchmarks/host_memory.py [--layers 6] [--out FOLDER]

Writes a GPT-2 Large shaped fp32 checkpoint (6 layers: 1.0 GB) in shards of 100 MB, 500 MB and in one file, and loads
each in a process of its own. ``above_final_bytes`` is the peak of private resident memory less what it was before
and less the bytes of the loaded model: what loading itself needs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, PeakHost, save
from material import GPT2, gpt2_tensors, write

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


def load(folder: Path, layers: int, format: str) -> dict[str, Any]:
    from mingpt_gpt2 import GPT

    import tuckaway

    tuckaway.quantize(
        torch.randn(64, 64), format
    )  # what is made once a process, such as tables, is not loading
    _, heads, width = GPT2["gpt2-large"]
    with tuckaway.init_empty_weights(include_buffers=True):
        model = GPT(layers, heads, width, 50257, 1024)
    with PeakHost() as host:
        began = time.perf_counter()
        tuckaway.load_and_quantize_model(model, format, weights_location=folder, progress=False)
        seconds = time.perf_counter() - began
    final = tuckaway.memory_footprint(model)
    return {
        "seconds": round(seconds, 2),
        "final_bytes": final,
        "above_final_bytes": host.peak - host.start - final,
        "grown_bytes": host.end - host.start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.load is not None:
        print("RESULT " + json.dumps(load(options.load, options.layers, options.format)))
        return
    _, _, width = GPT2["gpt2-large"]
    tensors = list(gpt2_tensors(options.layers, width))
    results = {}
    for shard_mb in (100, 500, 10_000):
        with tempfile.TemporaryDirectory() as scratch:
            size = write(Path(scratch), tensors, torch.float32, shard_mb * 10**6, threads=2)
            command = [sys.executable, __file__, "--load", scratch, "--layers", str(options.layers)]
            done = subprocess.run(
                [*command, "--format", options.format], capture_output=True, text=True, check=True
            )
            line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
            results[f"shards of {shard_mb} MB"] = {"checkpoint_bytes": size} | json.loads(line[7:])
            print(shard_mb, results[f"shards of {shard_mb} MB"], flush=True)
    print(save(f"host_memory_{options.format}", results, options.out))


if __name__ == "__main__":
    main()
