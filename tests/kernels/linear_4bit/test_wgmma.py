"""What of the product by wgmma runs without a GPU: the order of x against that of the weights, and its compilation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tuckaway_kernels.backend import has_triton
from tuckaway_kernels.selection import Choice

MODULE = "tuckaway_kernels.linear_4bit.wgmma_launch"


@pytest.fixture
def order(interpret: Callable[..., Any]) -> Callable[..., tuple[torch.Tensor, ...]]:
    interpret("kernels.ptx", "install")

    def call(x: torch.Tensor, tile_m: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x in order, and the powers of its rows."""
        m, cols = x.shape
        ordered = torch.full((-(-m // tile_m) * tile_m, cols), torch.nan, dtype=torch.float16)
        choice, powers = Choice("wgmma", 64, 4, tile_m, stages=4), torch.full((m,), torch.nan)
        found = interpret("kernels.linear_4bit.test_wgmma", "run_order", choice, m, cols, x, ordered, powers)
        return found[1], found[2]

    return call


def run_order(choice: Choice, m: int, cols: int, *tensors: torch.Tensor) -> None:
    """Run in the process that interprets kernels."""
    from tuckaway_kernels.linear_4bit.wgmma_launch import order_turns

    order_turns(choice, m, cols, overlap=False)(*tensors)


def fragments(weights: torch.Tensor) -> torch.Tensor:
    """Put a turn of weights [rows, 128] in the order in which `decode_step` hands them over, by its own operations.

    Words, of 8 weights, lie four to a lane; of a byte's two weights the first is in the high nibble, and is decoded to
    the low half of a pair.
    """
    rows = weights.shape[0]
    words = weights.view(rows, 4, 2, 2, 4, 2)  # lane, step, word, byte, nibble
    steps = []
    for step in (0, 1):
        p, q, u, v = words[:, :, step].reshape(rows, 8, 4, 2).unbind(2)
        pairs = torch.stack([torch.stack([p, u], 2), torch.stack([q, v], 2)], 3)  # [rows, 8, 2, 2, nibble]
        both = pairs.reshape(rows, 4, 4, 2, 2)
        steps.append(both.permute(0, 2, 3, 1, 4).reshape(rows, 64))
    return torch.cat(steps, 1)


@pytest.mark.parametrize(("m", "cols"), [(3, 128), (5, 640), (2, 8192 + 384)])
def test_x_is_in_the_order_of_the_weights(order: Callable[..., Any], m: int, cols: int) -> None:
    x, weights = torch.randn(m, cols).bfloat16(), torch.randn(4, cols, dtype=torch.float64)
    ordered, powers = order(x)
    assert not ordered[m:].any()
    assert not ordered.isnan().any()
    turned = torch.cat([fragments(turn) for turn in weights.split(128, 1)], 1)
    total = (ordered[:m].double() @ turned.t()) * powers[:, None]
    assert torch.allclose(total, x.double() @ weights.t(), rtol=0, atol=1e-9 * cols)  # bf16 fits into fp16


def test_a_lane_multiplies_the_columns_it_has() -> None:
    """Element k of the operand lies in lane k // 2 % 4; its weights must be the 32 neighbours that the lane loaded."""
    numbers = fragments(torch.arange(128.0)[None])[0].view(2, 8, 4, 2)
    for lane in range(4):
        assert sorted(numbers[:, :, lane].flatten().tolist()) == list(range(32 * lane, 32 * lane + 32))


def test_rows_are_brought_to_where_fp16_is_exact(order: Callable[..., Any]) -> None:
    x = torch.ones(6, 128)
    x[0], x[1, 0], x[2], x[3], x[4, 5] = 0, 6e4, 1e-30, -7.0, 3e38
    ordered, powers = order(x)
    largest = ordered[:6].float().abs().amax(1)
    assert largest[0] == 0
    assert ((largest[1:] >= 4) & (largest[1:] < 8)).all()
    assert torch.equal(powers.log2(), powers.log2().round())
    assert (ordered[3].float() * powers[3] == -7).all()


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_it_compiles_for_hopper() -> None:
    script = Path(__file__).parents[1] / "hopper.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["orders"] == [True, True]
    assert len(found["products"]) == 3
    for product in found["products"]:
        assert product["products"] == 8  # 4 instructions of 16 columns a step, two steps a turn
        assert product["wide_loads"] >= 4  # a lane's four words, of two rows, before the loop and in it
        assert product["shared"] <= 232_448 // (1 if product["tile_m"] == 256 else 4)
