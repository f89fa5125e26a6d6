"""Pictures of the formats' bytes, drawn from tensors that tuckaway quantized and files that it wrote.

    python docs/draw/formats.py

writes ``nf4.svg``, ``int8.svg`` and ``page.svg`` to ``docs/pictures``. Values, codes, offsets and sizes are read from
the library, so that a picture cannot say what the code does not do; a test draws them anew and compares.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from canvas import AMBER, BLUE, FAINT, GREEN, GREY, RED, VIOLET, Canvas, write_pictures
from torch import nn

import tuckaway
from tuckaway.checkpoint import Checkpoint
from tuckaway.paging.page import PageLayout
from tuckaway.plan import choose_specs
from tuckaway.tensor import components_of
from tuckaway_kernels.codebooks import codebook

COLOURS = {
    "codes": BLUE,
    "absmax": GREEN,
    "nested_absmax": AMBER,
    "nested_offset": RED,
    "scales": GREEN,
    "": GREY,
}


def weights(rows: int, cols: int) -> torch.Tensor:
    """Return weights fp32 ``[rows, cols]``, the same on every machine and for every version of torch."""
    steps = torch.arange(rows * cols, dtype=torch.float64)
    return (torch.sin(steps * 12.9898) * 0.06).float().reshape(rows, cols)


def nf4() -> Canvas:
    weight = weights(2, 128)
    plain = components_of(tuckaway.quantize(weight, tuckaway.QuantizationConfig("nf4", nested=False)))
    flat, values = weight.flatten(), codebook("nf4", torch.device("cpu"))
    sheet = Canvas(760, 420, "nf4: sixteen values, two codes a byte, a scale for 64 weights")
    sheet.text(
        20, 28, "nf4: a weight [2, 128], row by row: 256 values, a scale for each 64 of them", bold=True
    )
    for block in range(4):
        sheet.box(20 + 180 * block, 40, 176, 26, BLUE)
        sheet.text(
            108 + 180 * block, 58, f"block {block}: absmax {plain['absmax'][block]:.6f}", anchor="middle"
        )
    sheet.line(20, 66, 20, 90, dashed=True)
    sheet.line(196, 66, 740, 90, dashed=True)
    sheet.text(
        20,
        106,
        "the first eight values of block 0: weight, weight / absmax, nearest of the sixteen",
        colour=FAINT,
    )
    for i in range(8):
        x, byte = 20 + 90 * i, int(plain["codes"][i // 2])
        code = byte >> 4 if i % 2 == 0 else byte & 15
        sheet.box(x, 114, 88, 24, GREY)
        sheet.text(x + 44, 131, f"{flat[i]:+.6f}", anchor="middle", mono=True)
        sheet.text(x + 44, 154, f"{flat[i] / plain['absmax'][0]:+.4f}", anchor="middle", size=11, mono=True)
        sheet.text(x + 44, 170, f"{values[code]:+.4f}", anchor="middle", size=11, mono=True)
        sheet.box(x, 178, 88, 24, BLUE)
        sheet.text(x + 44, 195, f"code {code}", anchor="middle", mono=True)
    for i in range(4):
        x, byte = 20 + 180 * i, int(plain["codes"][i])
        sheet.box(x, 210, 178, 26, BLUE)
        both = f"byte {i}: 0x{byte:02X} = {byte >> 4}, {byte & 15}"
        sheet.text(x + 89, 228, both, anchor="middle", mono=True)
    sheet.text(
        20,
        258,
        "Element 2i is the high nibble of byte i, 2i + 1 the low one. A weight is its code's value x its absmax.",
        size=11.5,
    )
    return _file(sheet, 290, "nf4", tuckaway.QuantizationConfig("nf4"))


def int8() -> Canvas:
    weight = weights(3, 8)
    parts = components_of(tuckaway.quantize(weight, tuckaway.QuantizationConfig("int8")))
    sheet = Canvas(760, 272, "int8: a scale a row")
    sheet.text(
        20,
        28,
        "int8: a weight [3, 8], a scale (SCB) for each row: code = round(weight x 127 / SCB)",
        bold=True,
    )
    for row in range(3):
        y = 44 + 34 * row
        for col in range(8):
            sheet.box(20 + 72 * col, y, 70, 28, BLUE)
            sheet.text(
                55 + 72 * col, y + 18, f"{int(parts['codes'][row, col]):d}", anchor="middle", mono=True
            )
        sheet.box(610, y, 130, 28, GREEN)
        sheet.text(675, y + 18, f"SCB {float(parts['absmax'][row]):.6f}", anchor="middle", mono=True)
    sheet.text(
        20, 164, "A weight is code x SCB / 127. Bytes lie row by row, as the weight itself does.", size=11.5
    )
    return _file(sheet, 196, "int8", tuckaway.QuantizationConfig("int8"))


def _file(sheet: Canvas, y: float, format: str, config: tuckaway.QuantizationConfig) -> Canvas:
    """Add the tensors that a checkpoint has for one weight of 512 by 512, from a file written here."""
    side = 512
    layer = nn.Sequential(nn.Linear(side, side, bias=False))
    with torch.no_grad():
        layer[0].weight.copy_(weights(side, side))
    with tempfile.TemporaryDirectory() as folder:
        model = tuckaway.load_and_quantize_model(layer, config.replace(quantize_head=True), device_map="cpu")
        tuckaway.save_model(model, folder)
        entries = Checkpoint.open(folder).entries
    sheet.text(20, y, f"in a file: one weight [{side}, {side}] in {format}", bold=True)
    for i, (name, entry) in enumerate(entries.items()):
        line = y + 22 + 19 * i
        sheet.box(20, line - 11, 12, 12, _colour(name))
        sheet.text(40, line, name.removeprefix("0."), mono=True, size=11.5)
        dtype = str(entry.dtype).removeprefix("torch.")
        sheet.text(400, line, f"{dtype} {list(entry.shape)}", mono=True, size=11.5)
        sheet.text(740, line, f"{entry.nbytes:,} bytes", anchor="end", mono=True, size=11.5)
    return sheet


def _colour(name: str) -> str:
    leaf = name.removeprefix("0.weight").removeprefix("0.").lstrip(".")
    by_leaf = {"": BLUE, "absmax": GREEN, "SCB": GREEN, "nested_absmax": AMBER}
    return by_leaf.get(leaf, VIOLET if "quant_state" in leaf else GREY)


class Layer(nn.Module):
    """What a decoder layer of 512 has: two norms, attention, a gated product."""

    def __init__(self, width: int = 512, inner: int = 1408) -> None:
        super().__init__()
        self.input_norm, self.post_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        for name in ("q", "k", "v", "o"):
            self.add_module(f"{name}_proj", nn.Linear(width, width, bias=False))
        self.gate_proj, self.up_proj = (
            nn.Linear(width, inner, bias=False),
            nn.Linear(width, inner, bias=False),
        )
        self.down_proj = nn.Linear(inner, width, bias=False)


def page() -> Canvas:
    config = tuckaway.QuantizationConfig("nf4", skip_modules=[])
    specs, _ = choose_specs(Layer(), config)
    layout = PageLayout.of(specs)
    rows = len(layout.items)
    sheet = Canvas(760, 150 + 17 * rows, "A page: everything of one block, contiguous")
    sheet.text(
        20,
        28,
        f"a page: one decoder layer in nf4, {layout.nbytes:,} bytes, every part at a multiple of 256",
        bold=True,
    )
    scale = 720 / layout.nbytes
    for item in layout.items:
        sheet.box(
            20 + item.offset * scale,
            42,
            max(item.nbytes * scale, 0.8),
            34,
            COLOURS[item.key[1]],
            edge="#94a3b8",
        )
    sheet.text(
        20,
        92,
        "to scale: codes blue, scales green; in RAM, in the file and in a slot of the GPU the bytes are these",
        size=11,
        colour=FAINT,
    )
    sheet.text(20, 122, "offset", bold=True, size=11.5)
    sheet.text(120, 122, "part", bold=True, size=11.5)
    sheet.text(740, 122, "bytes", bold=True, anchor="end", size=11.5)
    for i, item in enumerate(layout.items):
        y = 140 + 17 * i
        sheet.box(20, y - 10, 10, 10, COLOURS[item.key[1]])
        sheet.text(100, y, f"{item.offset:,}", anchor="end", mono=True, size=11)
        sheet.text(120, y, " ".join(part for part in item.key if part), mono=True, size=11)
        sheet.text(560, y, f"{str(item.dtype).removeprefix('torch.')} {list(item.shape)}", mono=True, size=11)
        sheet.text(740, y, f"{item.nbytes:,}", anchor="end", mono=True, size=11)
    return sheet


DRAWN: dict[str, Callable[[], Canvas]] = {"nf4.svg": nf4, "int8.svg": int8, "page.svg": page}


if __name__ == "__main__":
    write_pictures(DRAWN)
