"""Which code serves an op: Triton's kernels, or the reference in plain torch.

The kernels run on any device Triton has a backend for. Everything else (a CPU, macOS, Windows) takes the
reference, which gives the same codes and scales bit for bit.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec


@cache
def has_triton() -> bool:
    """Tell whether Triton is installed; it is not imported for that."""
    return find_spec("triton") is not None


@cache
def interpreting() -> bool:
    """Tell whether Triton's interpreter was asked for, in which kernels run on CPU tensors.

    The interpreter runs no inline PTX, and its bf16 products and stores are wrong: kernels take a plain path there.
    """
    return os.environ.get("TRITON_INTERPRET", "0") not in {"", "0"}
