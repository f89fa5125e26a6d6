"""The timeline of paging, drawn from ``benchmarks/results/timeline.json``.

python docs/draw/timeline.py
"""

from __future__ import annotations

import json
from pathlib import Path

from canvas import AMBER, BLUE, FAINT, GREEN, RED, VIOLET, Canvas, write_pictures

ROOT = Path(__file__).parents[2]
COLOURS = (BLUE, GREEN, AMBER, VIOLET, RED, "#bae6fd")
LEFT, RIGHT, LANES = 96, 744, {"compute": 150, "slot 0": 54, "slot 1": 98}


def timeline() -> Canvas:
    measured = json.loads((ROOT / "benchmarks" / "results" / "timeline.json").read_text(encoding="utf-8"))
    results = measured["results"]
    intervals = [one for one in results["intervals"] if one["what"] != "wait"]
    end = max(one["end"] for one in intervals)
    across = (RIGHT - LEFT) / end
    sheet = Canvas(760, 250, "Pages are read while the blocks before them compute")
    size = results["page_bytes"] / 1e6
    sheet.text(
        20, 28, f"two forwards through six blocks on disk, pages of {size:.1f} MB, two slots", bold=True
    )
    for name, y in LANES.items():
        sheet.text(20, y + 20, name, size=12)
        sheet.line(LEFT, y + 32, RIGHT, y + 32, colour="#cbd5e1")
    for one in intervals:
        y = LANES["compute" if one["what"] == "compute" else f"slot {one['slot']}"]
        x, width = LEFT + one["begin"] * across, (one["end"] - one["begin"]) * across
        sheet.box(x, y, width, 32, COLOURS[one["block"] % len(COLOURS)], edge="#64748b")
        if one["what"] == "compute":
            sheet.text(x + width / 2, y + 21, str(one["block"]), anchor="middle", size=12)
        else:
            sheet.text(x + width + 3, y + 21, f"read {one['block']}", size=9.5, colour=FAINT)
    first = [one["begin"] for one in intervals if one["what"] == "compute" and one["block"] == 0]
    for number, begin in enumerate(first):
        sheet.line(LEFT + begin * across, 46, LEFT + begin * across, 196, dashed=True, colour=FAINT)
        sheet.text(LEFT + begin * across + 3, 194, f"forward {number + 1}", size=10, colour=FAINT)
    for tenth in range(int(end * 10) + 1):
        x = LEFT + tenth / 10 * across
        sheet.line(x, 200, x, 205)
        sheet.text(x, 218, f"{100 * tenth} ms", size=10, anchor="middle", colour=FAINT)
    versions = measured["conditions"]
    words = f"{versions['device']}, one thread computes, torch {versions['versions']['torch']}, nf4, "
    sheet.text(20, 240, words + "64 rows of input, cold reads", size=10, colour=FAINT)
    return sheet


DRAWN = {"timeline.svg": timeline}


if __name__ == "__main__":
    write_pictures(DRAWN)
