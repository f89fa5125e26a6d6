"""Launches that begin before those in front of them have ended (programmatic dependent launch), on NVIDIA GPUs.

A kernel launched so waits itself, where it first reads what is not settled; `launching.Launch` has it as ``overlap``.

Two rules keep this right whatever lies in front. A kernel that may be the first of an op reads nothing at all before it
has waited: its weights, too, may have just been written. And it lets the next launch begin only after that, so that one
which follows in the same op may read at once all that is older than the op.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def after_launch_before(value):
    """``value`` (int32), once all that the launch before this one has written is there."""
    return tl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.u32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def begin_next_launch(value):
    """``value`` (int32); the next launch may begin, as far as it does not wait for what this one writes."""
    return tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, $1;",
        "=r,r",
        [value],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
