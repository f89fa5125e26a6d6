"""A picture of a plan: one bar a device, all to one scale, the blocks side by side in it. Written as SVG by hand."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tuckaway.plan.accounts import DeviceMemory
from tuckaway.plan.blocks import PlannedBlock
from tuckaway.plan.memory import Device, format_bytes

__all__ = ["draw"]

_WIDTH, _LEFT, _BAR, _STEP, _TOP = 960, 90, 44, 86, 64
_COLORS = {"nf4": "#4878cf", "fp4": "#6a5acd", "int8": "#e69f00"}
_PLAIN = "#8c9aa8"
_PARTS = (
    ("padding", "padding_bytes", "#c8ccd0"),
    ("slots", "slots_bytes", "#56b4a9"),
    ("cache of the disk", "cache_bytes", "#b7a6d6"),
    ("buffers", "buffers_bytes", "#9bd0c8"),
    ("reserve", "reserve_bytes", "#f2d58a"),
)
"""What a device holds beside blocks: name, attribute, color."""


def draw(name: str, title: str, blocks: Sequence[PlannedBlock], devices: Sequence[DeviceMemory]) -> str:
    """Return the picture as SVG text.

    Args:
        name: the model's.
        title: second line.
        blocks: in the order in which they are drawn.
        devices: one bar each; an outline shows a device's limit.
    """
    shown = [memory for memory in devices if memory.peak_bytes or memory.limit_bytes]
    most = max((_extent(memory) for memory in shown), default=1) or 1
    scale = (_WIDTH - _LEFT - 20) / most
    height = _TOP + _STEP * len(shown) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="100%" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{escape(f"{name}: {title}")}">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="24" font-size="16" font-weight="bold">{escape(name)}</text>',
        f'<text x="12" y="44" fill="#555555">{escape(title)}</text>',
    ]
    for row, memory in enumerate(shown):
        top = _TOP + row * _STEP
        parts += _bar(memory, [block for block in blocks if block.device == memory.device], top, scale)
    parts += _legend(blocks, shown, _TOP + _STEP * len(shown) + 8)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _extent(memory: DeviceMemory) -> int:
    held = memory.in_use_bytes + memory.reserve_bytes
    if memory.limit_bytes is None:
        return held
    # a limit of a hundred times the model would leave nothing to see of the model
    return max(held, min(memory.limit_bytes, 4 * held))


def _bar(memory: DeviceMemory, blocks: Sequence[PlannedBlock], top: int, scale: float) -> list[str]:
    limit = memory.limit_bytes
    within = memory.in_use_bytes + memory.reserve_bytes
    if memory.device == "cpu" and limit is not None:
        within -= memory.buffers_bytes  # which no limit of RAM is held to
    label = format_bytes(within) + ("" if limit is None else f" of {format_bytes(limit)}")
    if within < memory.in_use_bytes + memory.reserve_bytes:
        label += f", and {format_bytes(memory.buffers_bytes)} of buffers"
    parts = [
        f'<text x="12" y="{top + 28}" font-weight="bold">{escape(_name(memory.device))}</text>',
        f'<text x="{_LEFT}" y="{top + _BAR + 16}" fill="#555555">{escape(label)}</text>',
    ]
    x = float(_LEFT)
    for block in blocks:
        color = _color(block)
        tip = (
            f"{block.name or '(the model itself)'}: {format_bytes(block.nbytes)}, {', '.join(block.formats)}"
        )
        if block.paged:
            tip += ", paged"
        parts.append(_box(x, top, block.nbytes * scale, color, tip))
        x += block.nbytes * scale
    for name, attribute, color in _PARTS:
        nbytes = getattr(memory, attribute)
        if nbytes:
            parts.append(_box(x, top, nbytes * scale, color, f"{name}: {format_bytes(nbytes)}"))
            x += nbytes * scale
    if limit is not None:
        width = min(limit, _extent(memory)) * scale
        parts.append(
            f'<rect x="{_LEFT}" y="{top}" width="{width:.2f}" height="{_BAR}" fill="none" stroke="#222222"/>'
        )
    return parts


def _box(x: float, top: int, width: float, color: str, tip: str) -> str:
    line = ' stroke="#ffffff" stroke-width="0.7"' if width > 3 else ""
    return (
        f'<rect x="{x:.2f}" y="{top}" width="{max(width, 0.01):.2f}" height="{_BAR}" fill="{color}"{line}>'
        f"<title>{escape(tip)}</title></rect>"
    )


def _legend(blocks: Sequence[PlannedBlock], devices: Sequence[DeviceMemory], top: int) -> list[str]:
    names: dict[str, list[str]] = {}
    for block in blocks:
        of_color = names.setdefault(_color(block), [])
        if _main_format(block) not in of_color:
            of_color.append(_main_format(block))
    entries = [(", ".join(formats), color) for color, formats in names.items()]
    entries += [
        (name, color)
        for name, attribute, color in _PARTS
        if any(getattr(memory, attribute) for memory in devices)
    ]
    parts, x = [], _LEFT
    for name, color in entries:
        parts.append(f'<rect x="{x}" y="{top}" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="{x + 17}" y="{top + 11}">{escape(name)}</text>')
        x += 30 + 8 * len(name)
    return parts


def _main_format(block: PlannedBlock) -> str:
    return max(block.formats, key=lambda name: block.formats[name], default="")


def _color(block: PlannedBlock) -> str:
    return _COLORS.get(_main_format(block), _PLAIN)


def _name(device: Device) -> str:
    return f"GPU {device}" if isinstance(device, int) else {"cpu": "RAM"}.get(device, str(device))
