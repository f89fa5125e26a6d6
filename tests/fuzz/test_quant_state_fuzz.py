"""A hundred thousand mutated quantization states: a typed error each, or a layout that its tensors fit."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from fuzzing import Mutator, Tally, assert_clean, hunt, spread
from heavy import count
from tuckaway.checkpoint import TensorEntry
from tuckaway.errors import CheckpointError
from tuckaway.formats import format_of

SEED = 60
NUMBER = count(10_000, 100_000)
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [16, 40]}
NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
DOCUMENTS = [
    STATE,
    {**STATE, **NESTED},
    {**STATE, "dtype": "float32", "shape": [640]},
    {**STATE, "shape": [4, 4, 40]},
]
KEY = "w.quant_state.bitsandbytes__nf4"
PLAIN = {"w": (torch.uint8, (320, 1)), "w.absmax": (torch.float32, (10,))}
SCALED = {
    "w": (torch.uint8, (320, 1)),
    "w.absmax": (torch.uint8, (10,)),
    "w.nested_absmax": (torch.float32, (1,)),
}


def job(seed: int, number: int) -> Tally:
    torch.set_num_threads(1)
    nf4 = format_of("nf4")

    def parse(data: bytes) -> None:
        held = SCALED if b"nested" in data else PLAIN
        entries = {
            name: TensorEntry(name, dtype, shape, Path("m"), 0, math.prod(shape) * dtype.itemsize)
            for name, (dtype, shape) in {**held, KEY: (torch.uint8, (len(data),))}.items()
        }
        found = nf4.find("w", entries, lambda name: torch.frombuffer(bytearray(data), dtype=torch.uint8))
        assert found is not None
        assert found.layout.numel in (639, 640)  # what 320 bytes of codes can hold
        for component, (shape, dtype) in nf4.component_specs(found.layout).items():
            if component in found.values:
                assert found.values[component].dtype == dtype
            else:
                assert math.prod(held[found.sources[component]][1]) == math.prod(shape)

    mutator = Mutator(DOCUMENTS, seed)
    return hunt(lambda: mutator() or b" ", parse, (CheckpointError,), number)


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_no_quantization_state_does_harm():
    assert_clean(spread(partial(job), NUMBER, seed=SEED), NUMBER, SEED)
