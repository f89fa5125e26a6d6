"""Write the page of the docs that says what is quantized in each model of the zoo: ``python tests/zoo/table.py``.

Run it with the tests' folder on the path and the extra ``zoo`` installed.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

import tuckaway
from tuckaway.plan import choose_specs, quantization_report, tied_groups
from zoo import vision_packages
from zoo.awkward_models import AWKWARD
from zoo.language_models import LANGUAGE
from zoo.perception_models import PERCEPTION

PAGE = Path(__file__).parents[2] / "docs/reference/models.md"

HEAD = """# What is quantized in each model

Made by `tests/zoo/table.py` from the models that the tests load in nf4 and int8, resident and with every block paged
from disk, and compare with the same weights dequantized. The format is nf4, everything else is left at its default.
*Weights* is the share of all weights that is quantized; *matrices* is the share where embeddings and the output head,
which the defaults leave out, are not counted. The models of transformers are tiny (a hidden size of 64), so that
vectors and small tables weigh more than in real ones.

What is quantized is given by the class of the module that holds it, in brackets the dimensions of a weight that is no
matrix. `model.quantization_report` says the same of your own model, parameter by parameter.

`torch.compile` gives the same results for every model of transformers here that compiles with plain weights, and
`torch.export` (`strict=False`, without a KV cache) for every one that exports with plain weights: not Encodec, LED,
Longformer, Qwen2VL and Vilt, which choose what they compute by a tensor's values, nor Nystromformer, PaliGemma and
SwitchTransformers. The program can be saved with `torch.export.save` and loaded by a process that imports tuckaway. A
paged model compiles with a break of the graph at every page, and cannot be exported before `tuckaway.materialize`.
"""


def models() -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """Yield section, name and constructor of each."""
    for entry in (*LANGUAGE, *PERCEPTION):
        yield f"transformers: {entry.kind}", entry.name, entry.build
    for name in vision_packages.NAMES:
        yield "timm and torchvision", name, lambda name=name: vision_packages.build(name)  # type: ignore[misc]
    for name, build in AWKWARD.items():
        yield "Written by hand", f"`{name}`", build


def row(name: str, build: Callable[[], nn.Module]) -> str:
    """One line of the table."""
    with tuckaway.init_empty_weights():
        model = build()
    specs, reasons = choose_specs(model, tuckaway.QuantizationConfig("nf4"))
    report = quantization_report(specs, reasons, ties=tied_groups(model))
    modules = dict(model.named_modules(remove_duplicate=False))
    done: Counter[str] = Counter()
    left: Counter[str] = Counter()
    total = matrices = quantized = 0
    for line in report.rows:
        if line.is_buffer:
            continue
        count = math.prod(line.shape)
        total += count
        if line.quantized:
            quantized += count
            dims = "" if len(line.shape) == 2 else f" [{len(line.shape)}-D]"
            done[type(modules[line.name.rpartition(".")[0]]).__name__ + dims] += 1
            matrices += count
            continue
        reason = (line.reason or "").partition(" (")[0].removeprefix("tied to ")
        if reason not in specs and reason not in ("the output head", "an embedding"):
            matrices += count
        if len(line.shape) > 1:
            left["tied" if reason in specs else reason] += 1
    shares = [f"{quantized / max(n, 1):.0%}" for n in (total, matrices)]
    return f"| {name} | {_counted(done)} | {shares[0]} | {shares[1]} | {_counted(left)} |"


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())


def main() -> int:
    """Write the page."""
    lacking = vision_packages.missing()
    if lacking:
        print(lacking, file=sys.stderr)
        return 1
    vision_packages.import_torchvision()
    lines, section = [HEAD], ""
    columns = (
        "| model | quantized | weights | matrices | matrices left, and why |\n| --- | --- | --- | --- | --- |"
    )
    for kind, name, build in models():
        if kind != section:
            section = kind
            lines.append(f"\n## {section}\n\n{columns}")
        lines.append(row(name, build))
    PAGE.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
