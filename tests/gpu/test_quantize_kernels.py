"""The Triton kernels on a real GPU: bitsandbytes' bytes, and equality with the references on every kind of shape."""

from __future__ import annotations

import pytest
import torch

import tuckaway_kernels  # noqa: F401
from golden import DTYPES, cases, digest, edge_blocks, golden, row_cases
from tuckaway_kernels.backend import has_triton
from tuckaway_kernels.nested_scales.reference import dequantize_nested, quantize_nested
from tuckaway_kernels.quantize_4bit.reference import quantize_4bit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator in this machine"),
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
]

OPS = torch.ops.tuckaway
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def gpu() -> torch.device:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return device


def memory() -> int:
    """Return the free bytes of the GPU."""
    return int(torch.get_device_module(gpu()).mem_get_info()[0])


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_gives_the_bytes_of_bitsandbytes(format: str, dtype: str) -> None:
    for case in cases():
        if case.format != format or case.dtype != dtype:
            continue
        codes, absmax = OPS.quantize_4bit(case.weights().to(gpu()), format, case.blocksize)
        assert (digest(codes), digest(absmax)) == (case.codes, case.absmax), case
        for out_dtype, expected in case.decoded().items():
            out = OPS.dequantize_4bit(codes, absmax, format, case.blocksize, case.shape, out_dtype)
            assert digest(out) == expected, (case, out_dtype)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_blocks_give_the_bytes_of_bitsandbytes(format: str, dtype: str) -> None:
    expected = golden()["edges"][f"{format}/{dtype}"]
    codes, absmax = OPS.quantize_4bit(edge_blocks(dtype).to(gpu()), format, 64)
    assert codes.cpu().numpy().tobytes().hex() == expected["codes"]
    assert absmax.cpu().numpy().tobytes().hex() == expected["absmax"]


def test_int8_gives_the_bytes_of_bitsandbytes() -> None:
    for case in row_cases():
        codes, absmax = OPS.quantize_int8(case.weights().to(gpu()))
        assert (digest(codes), digest(absmax)) == (case.codes, case.absmax), case


def test_the_reciprocal_is_the_one_in_the_table() -> None:
    """Every eighth mantissa as the largest of a block, whose other weights lie at the thresholds."""
    mantissa = torch.arange(0, 1 << 23, 8, dtype=torch.int32)
    largest = (mantissa + 0x3F800000).view(torch.float32)
    x = torch.zeros(mantissa.numel(), 32)
    x[:, 0] = largest
    for i, limit in enumerate(
        (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
    ):
        product = largest * torch.tensor(limit)
        x[:, 3 * i + 1] = product
        x[:, 3 * i + 2] = torch.nextafter(product, torch.tensor(9.0))
        x[:, 3 * i + 3] = -torch.nextafter(product, torch.tensor(-9.0))
    codes, _ = OPS.quantize_4bit(x.to(gpu()), "fp4", 32)
    assert torch.equal(codes.cpu(), quantize_4bit(x, "fp4", 32)[0])


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("n", [1, 2, 63, 4096, 4097, 1_000_003, 1 << 20])
def test_4bit_equals_the_reference(format: str, dtype: torch.dtype, blocksize: int, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x = (torch.randn(n, generator=generator) * 10.0 ** torch.randint(-40, 30, (n,), generator=generator)).to(
        dtype
    )
    x[n // 3 : n // 2] *= 0
    codes, absmax = OPS.quantize_4bit(x.to(gpu()), format, blocksize)
    expected, scales = quantize_4bit(x, format, blocksize)
    assert torch.equal(absmax.cpu(), scales)
    assert torch.equal(codes.cpu(), expected)
    finite = scales.nan_to_num(posinf=1.0)
    for out_dtype in FLOATS:
        room = torch.full((n + 2,), torch.nan, dtype=out_dtype, device=gpu())
        OPS.dequantize_4bit_out(codes, finite.to(gpu()), format, blocksize, room[1:-1])
        reference = OPS.dequantize_4bit(expected, finite, format, blocksize, [n], out_dtype)
        assert digest(room[1:-1]) == digest(reference)
        assert room[[0, -1]].isnan().all()


def test_4bit_writes_into_slices_at_odd_offsets() -> None:
    x = torch.randn(8192 + 100, device=gpu())
    codes, absmax = OPS.quantize_4bit(x, "nf4", 64)
    room = torch.full((codes.numel() + 6,), 0xAB, dtype=torch.uint8, device=gpu())
    scales = torch.full((absmax.numel() + 2,), torch.nan, device=gpu())
    OPS.quantize_4bit_out(x[:4160], "nf4", 64, room[3 : 3 + 2080], scales[1 : 1 + 65])
    OPS.quantize_4bit_out(x[4160:], "nf4", 64, room[3 + 2080 : -3], scales[66:-1])
    assert torch.equal(room[3:-3], codes)
    assert torch.equal(scales[1:-1], absmax)
    assert room[[0, 1, 2, -3, -2, -1]].tolist() == [0xAB] * 6
    assert scales[[0, -1]].isnan().all()


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000, 70_001, 1 << 20])
def test_nested_equals_the_reference_and_is_the_same_every_time(n: int) -> None:
    absmax = torch.rand(n, generator=torch.Generator().manual_seed(n)) ** 4
    first = OPS.quantize_nested(absmax.to(gpu()))
    for ours, again, expected in zip(
        first, OPS.quantize_nested(absmax.to(gpu())), quantize_nested(absmax), strict=True
    ):
        assert digest(ours) == digest(again) == digest(expected)
    assert digest(OPS.dequantize_nested(*first)) == digest(dequantize_nested(*(t.cpu() for t in first)))


def test_nested_scales_wait_for_the_weights_in_front_of_them() -> None:
    """Launches that begin early read nothing too early: weight after weight, nothing waited for, eager and captured."""
    weights = [torch.randn(1024, 4096) * 10.0**i for i in range(-4, 4)]
    expected = [quantize_nested(quantize_4bit(w, "nf4", 64)[1]) for w in weights]
    given = [w.to(gpu()) for w in weights]
    rooms = [tuple(torch.empty_like(part, device=gpu()) for part in parts) for parts in expected]

    def quantize_all() -> None:
        for w, room in zip(given, rooms, strict=True):
            OPS.quantize_nested_out(OPS.quantize_4bit(w, "nf4", 64)[1], *room)

    def check() -> None:
        for room, parts in zip(rooms, expected, strict=True):
            assert [digest(part.cpu()) for part in room] == [digest(part) for part in parts]
            for part in room:
                part.fill_(77)

    for _ in range(3):
        quantize_all()
        check()
    if torch.cuda.is_available():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            quantize_all()
        for _ in range(3):
            graph.replay()
            check()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape", [(1,), (3, 7), (2, 3, 513), (65, 8192), (3, 20_001), (100_000, 5), (4, 16_384)]
)
def test_int8_equals_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    if w.dim() > 1:
        w[0] = 0
        w[1, 0] = torch.nan
        w[2 % len(w), 1] = torch.inf
    codes, absmax = OPS.quantize_int8(w.to(gpu()))
    expected, scales = OPS.quantize_int8(w)
    assert torch.equal(absmax.cpu(), scales)
    assert torch.equal(codes.cpu(), expected)
    finite = scales.nan_to_num(posinf=1.0)
    for out_dtype in FLOATS:
        out = OPS.dequantize_int8(codes, finite.to(gpu()), out_dtype)
        assert digest(out) == digest(OPS.dequantize_int8(expected, finite, out_dtype))


def test_more_than_2_to_the_31_weights() -> None:
    rows, columns = (1 << 18) + 1, 1 << 13
    if memory() < 11 * 10**9:
        pytest.skip("needs 11 GB of free GPU memory")
    head = torch.randn(64, columns, dtype=torch.bfloat16)
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=gpu())
    x[:64] = head.to(gpu())
    x[-64:] = head.to(gpu())
    codes, absmax = OPS.quantize_4bit(x, "nf4", 64)
    expected, scales = quantize_4bit(head, "nf4", 64)
    for part in (slice(None, expected.numel()), slice(-expected.numel(), None)):
        assert torch.equal(codes[part].cpu(), expected)
    assert torch.equal(absmax[-scales.numel() :].cpu(), scales)
    assert int(codes[expected.numel() : -expected.numel()].max()) == 0
    x.fill_(torch.nan)
    OPS.dequantize_4bit_out(codes, absmax, "nf4", 64, x)
    reference = OPS.dequantize_4bit(expected, scales, "nf4", 64, head.shape, torch.bfloat16)
    assert torch.equal(x[:64].cpu(), reference)
    assert torch.equal(x[-64:].cpu(), reference)
    del codes, absmax
    rows8, scales8 = OPS.quantize_int8(x)
    expected8, row_scales = OPS.quantize_int8(reference)
    assert torch.equal(rows8[-64:].cpu(), expected8)
    assert torch.equal(scales8[-64:].cpu(), row_scales)
    x.fill_(torch.nan)
    OPS.dequantize_int8_out(rows8, scales8, x)
    assert torch.equal(x[-64:].cpu(), OPS.dequantize_int8(expected8, row_scales, torch.bfloat16))
