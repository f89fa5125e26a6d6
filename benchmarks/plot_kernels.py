"""Draw how near each product comes to what the GPU allows, by shape and batch, from the JSON of ``kernels.py``.

    python benchmarks/plot_kernels.py [--json FILE] [--out FILE]

Needs matplotlib. A kernel whose output was wrong has no time and is not drawn.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from common import RESULTS

LINES = ("nf4", "nf4 nested", "bitsandbytes nf4", "torch int4", "bf16")


def fractions(results: list[dict[str, Any]], what: str, shape: list[int]) -> tuple[list[int], list[float]]:
    """Return the batches measured and, of each, the least possible time over the time taken."""
    rows = [
        r for r in results if r.get("what") == what and r.get("shape") == shape and "us" in r and "m" in r
    ]
    rows.sort(key=lambda row: row["m"])
    return [r["m"] for r in rows], [r["limit_us"] / r["us"] for r in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "kernels.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.png")
    options = parser.parse_args()
    plt: Any = importlib.import_module("matplotlib.pyplot")
    measured = json.loads(options.json.read_text(encoding="utf-8"))
    results = measured["results"]["results"]
    shapes = sorted({tuple(r["shape"]) for r in results if r["what"] == "nf4" and "shape" in r and "m" in r})
    figure, axes = plt.subplots(1, len(shapes), figsize=(4 * len(shapes), 3.6), sharey=True, squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        for what in LINES:
            batches, reached = fractions(results, what, list(shape))
            if batches:
                axis.plot(batches, reached, marker="o", markersize=3, label=what)
        axis.set(xscale="log", ylim=(0, 1.05), title=f"{shape[0]} x {shape[1]}", xlabel="rows of x")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("least possible time / time taken")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(measured["conditions"]["device"], fontsize=9)
    figure.tight_layout()
    figure.savefig(options.out, dpi=110)
    print(options.out)


if __name__ == "__main__":
    main()
