"""SVG by hand: boxes, text and lines on a white sheet that is legible in a light page and in a dark one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

PICTURES = Path(__file__).parents[1] / "pictures"
INK, FAINT = "#1b1f24", "#6b7280"
BLUE, GREEN, AMBER, RED, VIOLET, GREY = "#bfdbfe", "#bbf7d0", "#fde68a", "#fecaca", "#ddd6fe", "#e5e7eb"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
SANS = "system-ui, -apple-system, Segoe UI, Roboto, sans-serif"


class Canvas:
    """Shapes one after the other; ``str()`` is the SVG.

    Args:
        width: of the sheet, in pixels.
        height: of the sheet.
        title: what it shows, for readers who cannot see it.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height = width, height
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str, *, edge: str = INK) -> None:
        """Draw a filled rectangle."""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" '
            f'stroke="{edge}" stroke-width="0.8"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 12,
        anchor: str = "start",
        mono: bool = False,
        bold: bool = False,
        colour: str = INK,
    ) -> None:
        """Write a line whose baseline is at ``y``."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-family="{MONO if mono else SANS}" font-size="{size:g}" '
            f'text-anchor="{anchor}" fill="{colour}"{weight} xml:space="preserve">{escape(words)}</text>'
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, *, colour: str = INK, dashed: bool = False
    ) -> None:
        """Draw a line."""
        dash = ' stroke-dasharray="3 3"' if dashed else ""
        self._parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
            f'stroke-width="0.8"{dash}/>'
        )

    def __str__(self) -> str:
        return "\n".join([*self._parts, "</svg>"]) + "\n"


def write_pictures(drawn: Mapping[str, Callable[[], Canvas]]) -> None:
    """Draw every picture into its file."""
    PICTURES.mkdir(exist_ok=True)
    for name, draw in drawn.items():
        (PICTURES / name).write_text(str(draw()), encoding="utf-8")
