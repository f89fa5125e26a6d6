"""nf4 and fp4 against bitsandbytes: its keys, its bytes, its states, in both directions; and what is refused.

bitsandbytes' CPU backend gives nf4 bytes that agree with its CUDA kernels, but for blocks of zeros; its fp4 bytes
disagree near zero, so fp4 is compared by what its own reader decodes.
"""

from __future__ import annotations

import json
import math
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from loading import decoded_by_bitsandbytes
from tuckaway.errors import CheckpointError
from tuckaway.formats import Components, Layout, format_of

SHAPES = [(64, 128), (32, 96), (48, 33), (1, 64), (96, 1), (7, 5)]


def linear_state(
    weight: torch.Tensor, kind: str, *, nested: bool, blocksize: int = 64
) -> dict[str, torch.Tensor]:
    """What bitsandbytes' own layer saves; no forward has run, which on the CPU would repack it."""
    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, quant_type=kind, compress_statistics=nested
    )
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type=kind, compress_statistics=nested, blocksize=blocksize
    )
    return {key: value.clone() for key, value in layer.to("cpu").state_dict().items()}


def written(weight: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    format = format_of(layout.format)
    return format.serialize("weight", format.quantize(weight, layout), layout)


def components(state: dict[str, torch.Tensor], found: Any) -> Components:
    """The components of what was found, as the loader makes them."""
    specs = format_of(found.layout.format).component_specs(found.layout)
    made: Components = {}
    for key, (shape, dtype) in specs.items():
        value = found.values[key] if key in found.values else state[found.sources[key]]
        value = value.reshape(-1).view(torch.uint8) if key == "codes" else value.to(dtype)
        made[key] = value.reshape(-1)[: math.prod(shape)].reshape(shape)
    return made


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_written_as_bitsandbytes_writes_it(
    shape: tuple[int, int], dtype: torch.dtype, blocksize: int, nested: bool
) -> None:
    weight = torch.randn(shape).to(dtype)
    theirs = linear_state(weight, "nf4", nested=nested, blocksize=blocksize)
    ours = written(weight, Layout("nf4", shape, dtype, blocksize, nested))
    assert ours.keys() == theirs.keys()
    # its lookup table is a nearest code in 65536 bins: some nested codes differ, and the mean of the scales is summed
    # in another order. Everything else is equal to the byte
    free = (
        {"weight.absmax", "weight.nested_absmax", "weight.quant_state.bitsandbytes__nf4"} if nested else set()
    )
    for key in theirs.keys() - free:
        assert (ours[key].dtype, ours[key].shape) == (theirs[key].dtype, theirs[key].shape), key
        assert torch.equal(ours[key], theirs[key]), key
    for key in free:
        assert ours[key].dtype == theirs[key].dtype


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 512])
def test_state_blob_is_theirs_to_the_byte(kind: str, nested: bool, blocksize: int) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        theirs = linear_state(torch.randn(64, 128).to(dtype), kind, nested=nested, blocksize=blocksize)
        key = f"weight.quant_state.bitsandbytes__{kind}"
        found = format_of(kind).find("weight", theirs, theirs.__getitem__)
        assert found is not None
        ours = format_of(kind).serialize("weight", components(theirs, found), found.layout)
        assert bytes(ours[key].tolist()) == bytes(theirs[key].tolist())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bitsandbytes_decodes_what_is_written_to_the_same_values(
    kind: str, nested: bool, shape: tuple[int, int]
) -> None:
    weight = torch.randn(shape, dtype=torch.bfloat16)
    layout = Layout(kind, shape, torch.bfloat16, 64, nested)
    format = format_of(kind)
    made = format.quantize(weight, layout)
    state = format.serialize("weight", made, layout)
    stats = {k: v for k, v in state.items() if k != "weight"}
    param = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, requires_grad=False, device="cpu")
    assert torch.equal(param.data.reshape(-1), made["codes"])
    assert tuple(param.quant_state.shape) == shape
    assert (param.quant_state.dtype, param.quant_state.blocksize) == (torch.bfloat16, 64)
    assert (param.quant_type, param.quant_state.nested) == (kind, nested)
    assert torch.equal(param.quant_state.absmax, made["absmax"])
    if nested:
        assert torch.equal(param.quant_state.state2.absmax, made["nested_absmax"])
        assert torch.equal(param.quant_state.offset, made["nested_offset"])
    expected = format.dequantize(made, layout, torch.bfloat16)
    assert torch.equal(decoded_by_bitsandbytes(state), expected)
    if shape == (64, 128):  # where its CPU backend is right
        assert torch.equal(dequantize_4bit(param.data, param.quant_state), expected)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_may_be_stored_as_any_dtype(storage: torch.dtype) -> None:
    for shape in [(64, 128), (5, 3), (1, 1)]:
        weight = torch.randn(shape)
        layout = Layout("nf4", shape, torch.float32, 64)
        state = written(weight, layout)
        codes = state["weight"].view(-1)
        padded = torch.zeros(
            math.ceil(codes.numel() / storage.itemsize) * storage.itemsize, dtype=torch.uint8
        )
        padded[: codes.numel()] = codes
        state["weight"] = padded.view(storage).view(-1, 1)
        found = format_of("nf4").find("weight", state, state.__getitem__)
        assert found is not None
        assert torch.equal(components(state, found)["codes"], codes)


def test_old_checkpoints_have_scales_in_half_precision() -> None:
    state = written(torch.randn(64, 64), Layout("nf4", (64, 64), torch.float16, 64))
    state["weight.absmax"] = state["weight.absmax"].to(torch.bfloat16)
    assert format_of("nf4").find("weight", state, state.__getitem__) is not None


def test_fp4_zero_has_both_signs_when_decoded_and_one_in_the_map() -> None:
    layout = Layout("fp4", (64,), torch.float32, 64)
    made = format_of("fp4").quantize(torch.tensor([1.0] + [-1e-9, 1e-9] * 31 + [0.0]), layout)
    state = format_of("fp4").serialize("weight", made, layout)
    assert not state["weight.quant_map"].signbit()[8]
    decoded = format_of("fp4").dequantize(made, layout, torch.float32)
    assert (decoded[1:] == 0).all()


class TestNarrow:
    @pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
    @pytest.mark.parametrize(("first", "rows"), [(0, 40), (0, 8), (8, 8), (256, 100), (511, 1), (3, 0)])
    def test_rows_are_the_rows(self, nested: bool, first: int, rows: int) -> None:
        layout = Layout("nf4", (600, 64), torch.float32, 64, nested)
        format = format_of("nf4")
        made = format.quantize(torch.randn(600, 64), layout)
        part = format.narrow(made, layout, first * 64, (rows, 64))
        assert part is not None
        expected = format.dequantize(made, layout, torch.float32)[first : first + rows]
        assert torch.equal(format.dequantize(*part, torch.float32), expected)
        assert {k: tuple(t.shape) for k, t in part[0].items()} == {
            k: shape for k, (shape, _) in format.component_specs(part[1]).items()
        }
        assert rows == 0 or part[0]["codes"].data_ptr() == made["codes"].data_ptr() + first * 32

    def test_a_run_between_blocks_is_none(self) -> None:
        layout = Layout("nf4", (8, 33), torch.float32, 64)
        format = format_of("nf4")
        made = format.quantize(torch.randn(8, 33), layout)
        assert format.narrow(made, layout, 33, (1, 33)) is None
        assert format.narrow(made, layout, 0, (1, 33)) is None
        assert format.narrow(made, layout, 0, (8, 33)) is not None


def corrupted(key: str, change: Any, *, nested: bool = True) -> dict[str, torch.Tensor]:
    state = written(torch.randn(64, 64), Layout("nf4", (64, 64), torch.float32, 64, nested))
    state[key] = change(state[key])
    return state


def blob(**changes: Any) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        content = json.loads(bytes(tensor.tolist()))
        content.update(changes)
        content = {k: v for k, v in content.items() if v is not Ellipsis}
        return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    return change


def raw(text: bytes) -> Any:
    return lambda _: torch.tensor(list(text), dtype=torch.uint8)


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (STATE, raw(b""), "unreadable quantization state"),
        (STATE, raw(b"{"), "unreadable quantization state"),
        (STATE, raw(b"\xff\xfe\x00\x01"), "unreadable quantization state"),
        (STATE, raw(b"[" * 100_000), "unreadable quantization state"),
        (STATE, raw(b"[1, 2]"), "no JSON object"),
        (STATE, lambda t: t.float() + 0.5, "unreadable quantization state"),
        (STATE, lambda t: t[:-3], "unreadable quantization state"),
        *(
            (STATE, blob(shape=v), "shape")
            for v in (..., None, 64, "64", [64, -64], [64.0, 64.0], [None], [True, 64])
        ),
        *((STATE, blob(blocksize=v), "blocksize") for v in (..., None, 0, -64, 63, 64.0, "64", 2**40, True)),
        *((STATE, blob(dtype=v), "dtype") for v in (..., None, "int8", "nn", "load", "float64", 32, "")),
        (STATE, blob(quant_type="fp4"), "a quantization state of 'fp4'"),
        *((STATE, blob(nested_offset=v), "nested_offset") for v in (None, "0.1", [0.1], True)),
        *((STATE, blob(nested_blocksize=v), "groups of") for v in (..., 64, None)),
        (STATE, blob(shape=[64, 128]), "does not hold the codes"),
        (STATE, blob(shape=[64, 2**70]), "shape"),
        (STATE, blob(shape=[2**40, 2**40]), "shape"),
        (STATE, blob(nested_offset=10**400), "nested_offset beyond"),
        (STATE, blob(blocksize=128), "does not hold the absmax"),
        ("weight", lambda t: t[:-1], "does not hold the codes"),
        ("weight.absmax", lambda t: t[:-1], "does not hold the absmax"),
        ("weight.absmax", lambda t: t.float(), "does not hold the absmax"),
        ("weight.nested_absmax", lambda t: t.to(torch.int32), "does not hold the nested_absmax"),
        ("weight.nested_absmax", lambda t: torch.cat([t, t]), "does not hold the nested_absmax"),
        ("weight.quant_map", lambda t: t + 0.01, "a codebook other than"),
        ("weight.quant_map", lambda t: t[:8], "a codebook other than"),
        ("weight.nested_quant_map", lambda t: -t, "a codebook other than"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(key: str, change: Any, message: str) -> None:
    state = corrupted(key, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        format_of("nf4").find("weight", state, state.__getitem__)
    assert "weight" in str(caught.value)


@pytest.mark.parametrize("key", ["weight.absmax", "weight.nested_absmax"])
def test_a_missing_part_is_refused(key: str) -> None:
    state = corrupted(STATE, lambda t: t)
    del state[key]
    with pytest.raises(CheckpointError, match=f"'{key}' is missing"):
        format_of("nf4").find("weight", state, state.__getitem__)


def test_codebooks_may_be_missing() -> None:
    state = corrupted(STATE, lambda t: t)
    del state["weight.quant_map"], state["weight.nested_quant_map"]
    found = format_of("nf4").find("weight", state, state.__getitem__)
    assert found is not None
    assert found.consumed == set(state)
