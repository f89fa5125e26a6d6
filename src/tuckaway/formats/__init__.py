"""What the bytes of a quantized tensor mean: nf4, fp4, int8, nested scales, and their keys in a checkpoint."""

from tuckaway.formats import four_bit, int8  # noqa: F401  (each registers its formats)
from tuckaway.formats.base import (
    BoundLinear,
    Emit,
    Entries,
    Format,
    PieceQuantizer,
    Serialized,
    format_of,
    registered_formats,
)
from tuckaway.formats.layout import Components, Layout, Shape, Specs

__all__ = [
    "BoundLinear",
    "Components",
    "Emit",
    "Entries",
    "Format",
    "Layout",
    "PieceQuantizer",
    "Serialized",
    "Shape",
    "Specs",
    "format_of",
    "registered_formats",
]
