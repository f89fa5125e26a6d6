"""The products on a real GPU: every path of the selection against float64, and the same bits however they are run.

A result may be 1.15 times as far from the exact one as its rounding to the output dtype is, plus 3e-4 (for fp16 and
bf16; fp32 has TF32's products nowhere). Weights are those that the path multiplies by: the fused kernels do not round
them to the dtype of the product, decoding does.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F

import tuckaway_kernels  # noqa: F401
from tuckaway import QuantizationConfig, quantize
from tuckaway_kernels.backend import has_triton
from tuckaway_kernels.linear_int8.reference import linear_int8
from tuckaway_kernels.selection import choose_4bit, choose_int8, fuses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator in this machine"),
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
]

OPS = torch.ops.tuckaway
BATCHES = [1, 2, 3, 4, 5, 16, 17, 64, 65, 128, 512]
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def gpu() -> torch.device:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return torch.device(device.type, torch.accelerator.current_device_index())


@cache
def matrix(rows: int, cols: int, format: str, blocksize: int, nested: bool) -> tuple[Parts, torch.Tensor]:
    """Return a 4-bit matrix and its fp32 scales."""
    codes, absmax = OPS.quantize_4bit(torch.randn(rows, cols, device=gpu()) * 0.05, format, blocksize)
    if not nested:
        return (codes, absmax, None, None), absmax
    scales = OPS.quantize_nested(absmax)
    return (codes, *scales), OPS.dequantize_nested(*scales)


def inputs(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(m, n, device=gpu()).to(dtype)
    x[:, n // 3] *= 10
    return x


def relative(a: torch.Tensor, exact: torch.Tensor) -> float:
    return float((a.double() - exact).norm() / exact.norm())


def check(result: torch.Tensor, exact: torch.Tensor, library: torch.Tensor | None = None) -> None:
    """``library``: torch's own product where the op calls it; cuBLAS may add the parts of a split sum in bf16."""
    assert result.isfinite().all()
    own = 2e-6 if result.dtype == torch.float32 else 3e-4
    if result.numel() < 1024:  # the roundings of few elements do not average out
        own *= 7
    floor = relative(exact.to(result.dtype), exact)
    if library is not None:
        floor = max(floor, relative(library, exact))
    assert relative(result, exact) <= 1.15 * floor + own


def check_4bit(
    m: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    format: str = "nf4",
    blocksize: int = 64,
    nested: bool = False,
    bias: bool = False,
    transpose: bool = True,
) -> None:
    parts, absmax = matrix(rows, cols, format, blocksize, nested)
    inner, outer = (cols, rows) if transpose else (rows, cols)
    x = inputs(m, inner, dtype)
    added = torch.randn(outer, device=gpu()).to(dtype) if bias else None
    first, again = (
        OPS.linear_4bit(x, *parts, added, format, blocksize, rows, cols, transpose, dtype) for _ in range(2)
    )
    choice = None
    if transpose and dtype != torch.float32 and fuses(x.device):
        choice = choose_4bit(x.device, m, rows, cols, blocksize, nested)
    decoded = dtype if choice is None else torch.float32
    weight = OPS.dequantize_4bit(parts[0], absmax, format, blocksize, (rows, cols), decoded).double()
    exact = x.double() @ (weight.t() if transpose else weight)
    exact = exact if added is None else exact + added.double()
    assert first.dtype == dtype
    check(first, exact)
    assert torch.equal(first, again)


@pytest.mark.parametrize("m", BATCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_4bit_at_every_batch(m: int, dtype: torch.dtype, nested: bool) -> None:
    check_4bit(m, 2048, 4096, dtype, nested=nested)


@pytest.mark.parametrize("m", [1, 3, 16, 64, 512])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 256])
def test_4bit_formats_and_blocks_with_bias(m: int, format: str, blocksize: int) -> None:
    check_4bit(m, 512, 2048, torch.bfloat16, format=format, blocksize=blocksize, bias=True)


@pytest.mark.parametrize("m", [1, 3, 17])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (7, 33), (33, 96), (65, 192), (6400, 1600), (3, 4160)])
@pytest.mark.parametrize("nested", [False, True])
def test_4bit_ragged_shapes(m: int, rows: int, cols: int, nested: bool) -> None:
    check_4bit(m, rows, cols, torch.bfloat16, nested=nested, bias=True)


@pytest.mark.parametrize("m", [1, 4, 16, 64])
def test_4bit_of_the_size_measured(m: int) -> None:
    check_4bit(m, 8192, 8192, torch.bfloat16)
    check_4bit(m, 8192, 8192, torch.bfloat16, nested=True)


@pytest.mark.parametrize("m", [33, 64, 100, 128, 129, 256, 300, 600, 1024])
@pytest.mark.parametrize(("rows", "cols"), [(128, 128), (192, 640), (1280, 11_008), (2048, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_4bit_of_many_rows(m: int, rows: int, cols: int, dtype: torch.dtype) -> None:
    check_4bit(m, rows, cols, dtype, bias=rows != 2048, nested=cols == 4096)


@pytest.mark.parametrize("m", [48, 120, 400])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 128, 512])
def test_4bit_of_many_rows_in_every_format(m: int, format: str, blocksize: int) -> None:
    check_4bit(m, 512, 1024, torch.bfloat16, format=format, blocksize=blocksize, bias=True)


@pytest.mark.parametrize("m", [64, 512])
def test_4bit_of_many_rows_where_rows_of_the_matrix_differ_widely(m: int) -> None:
    """A result is as near as its own row of weights and row of x allow, whatever the largest of the others are."""
    rows, cols = 512, 1024
    sizes = 10.0 ** torch.linspace(-30, 20, rows, device=gpu())[:, None]
    codes, absmax = OPS.quantize_4bit(torch.randn(rows, cols, device=gpu()) * sizes, "nf4", 64)
    absmax.view(rows, -1)[7] = 0
    x = inputs(m, cols, torch.bfloat16) * torch.logspace(-8, 8, m, device=gpu(), dtype=torch.float32)[:, None]
    x = x.to(torch.bfloat16)
    result = OPS.linear_4bit(x, codes, absmax, None, None, None, "nf4", 64, rows, cols, True, torch.bfloat16)
    weight = OPS.dequantize_4bit(codes, absmax, "nf4", 64, (rows, cols), torch.float32).double()
    exact = x.double() @ weight.t()
    assert not result[:, 7].any()
    # half a unit in the last of bf16's 8 bits, and what codes in fp16 make of a sum of random signs
    own = x.double().norm(dim=1)[:, None] * weight.norm(dim=1)[None, :]
    assert ((result.double() - exact).abs() <= exact.abs() * 2.0**-8 + own * 2e-3).all()


@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "cols"), [(2048, 4096), (31, 129)])
def test_4bit_untransposed(m: int, dtype: torch.dtype, rows: int, cols: int) -> None:
    check_4bit(m, rows, cols, dtype, transpose=False, nested=True, bias=True)


def test_4bit_gradient() -> None:
    parts, absmax = matrix(512, 1024, "nf4", 64, True)
    x = inputs(5, 1024, torch.bfloat16).requires_grad_()
    bias = torch.randn(512, device=gpu(), dtype=torch.bfloat16, requires_grad=True)
    result = OPS.linear_4bit(x, *parts, bias, "nf4", 64, 512, 1024, True, torch.bfloat16)
    with torch.no_grad():
        plain = OPS.linear_4bit(x, *parts, bias, "nf4", 64, 512, 1024, True, torch.bfloat16)
    assert torch.equal(result, plain)
    grad = torch.randn_like(result)
    dx, db = torch.autograd.grad(result, (x, bias), grad)
    weight = OPS.dequantize_4bit(parts[0], absmax, "nf4", 64, (512, 1024), torch.bfloat16)
    check(dx, grad.double() @ weight.double())
    check(db, grad.double().sum(0))


@pytest.mark.parametrize("m", [1, 5, 64])
def test_4bit_takes_slices_at_odd_addresses(m: int) -> None:
    parts, _ = matrix(64, 512, "nf4", 64, False)
    x = inputs(m, 512, torch.bfloat16)

    def run(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return OPS.linear_4bit(x, codes, scales, None, None, None, "nf4", 64, 64, 512, True, x.dtype)

    def moved(t: torch.Tensor) -> torch.Tensor:
        room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        room[1:] = t.view(-1)
        return room[1:].view(t.shape)

    assert torch.equal(run(x, parts[0], parts[1]), run(moved(x), moved(parts[0]), moved(parts[1])))


def test_4bit_casts_to_the_compute_dtype() -> None:
    parts, _ = matrix(512, 1024, "nf4", 64, False)
    x, bias = inputs(4, 1024, torch.float32), torch.randn(512, device=gpu())
    ours = OPS.linear_4bit(x, *parts, bias, "nf4", 64, 512, 1024, True, torch.bfloat16)
    cast = OPS.linear_4bit(x.bfloat16(), *parts, bias.bfloat16(), "nf4", 64, 512, 1024, True, torch.bfloat16)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, cast.float())


def test_4bit_refuses_tensors_on_the_cpu() -> None:
    parts, _ = matrix(64, 512, "nf4", 64, False)
    x = inputs(1, 512, torch.bfloat16)
    OPS.linear_4bit(x, *parts, None, "nf4", 64, 64, 512, True, x.dtype)
    with pytest.raises((ValueError, RuntimeError)):
        OPS.linear_4bit(x, parts[0], parts[1].cpu(), None, None, None, "nf4", 64, 64, 512, True, x.dtype)


@pytest.mark.parametrize("m", BATCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "cols"), [(2048, 4096), (33, 300)])
def test_int8_weights_alone(m: int, dtype: torch.dtype, rows: int, cols: int) -> None:
    codes, absmax = OPS.quantize_int8(torch.randn(rows, cols, device=gpu()) * 0.05)
    x, bias = inputs(m, cols, dtype), torch.randn(rows, device=gpu()).to(dtype)
    first, again = (OPS.linear_int8(x, codes, absmax, bias, None, True, dtype) for _ in range(2))
    fused = fuses(x.device) and choose_int8(x.device, m, rows, cols, dtype) is not None
    weight = OPS.dequantize_int8(codes, absmax, torch.float32 if fused else dtype).double()
    library = None if fused else x @ weight.to(dtype).t() + bias
    check(first, x.double() @ weight.t() + bias.double(), library)
    assert torch.equal(first, again)
    y = inputs(m, rows, dtype)
    plain = OPS.dequantize_int8(codes, absmax, dtype)
    check(OPS.linear_int8(y, codes, absmax, None, None, False, dtype), y.double() @ plain.double(), y @ plain)


@pytest.mark.parametrize("m", [1, 17, 512])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize(("rows", "cols"), [(33, 301), (6400, 1600)])
def test_llm_int8_equals_the_reference(
    m: int, dtype: torch.dtype, threshold: float, rows: int, cols: int
) -> None:
    codes, absmax = OPS.quantize_int8(torch.randn(rows, cols, device=gpu()) * 0.05)
    x, bias = inputs(m, cols, dtype), torch.randn(rows, device=gpu()).to(dtype)
    first, again = (OPS.linear_int8(x, codes, absmax, bias, threshold, True, dtype) for _ in range(2))
    expected = linear_int8(x, codes, absmax, bias, threshold, True, dtype)
    assert torch.equal(first, again)
    # fp16 in the middle for every dtype; bf16 is rounded where the outliers are added
    step = torch.finfo(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16).eps
    torch.testing.assert_close(first, expected, rtol=2 * step, atol=2 * step)
    assert relative(first, expected.double()) < step
    if threshold == 0.0:
        assert torch.equal(first, expected)


BOUND = {
    "nf4": {"format": "nf4", "nested": False},
    "nf4 nested": {"format": "nf4"},
    "LLM.int8()": {"format": "int8", "int8_threshold": 6.0},
    "LLM.int8() without outliers": {"format": "int8", "int8_threshold": 0.0},
    "int8": {"format": "int8", "int8_threshold": None},
}


@pytest.mark.parametrize("m", [1, 2, 3, 4, 16, 17, 64, 128])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", BOUND)
def test_what_a_weight_keeps_gives_the_bits_of_the_op(m: int, bias: bool, kind: str) -> None:
    """`F.linear` with nothing but a result wanted goes past the dispatcher; with a gradient it does not."""
    for dtype in (torch.bfloat16, torch.float16):
        config = QuantizationConfig(**BOUND[kind], compute_dtype=dtype)
        weight = quantize(torch.randn(512, 1024, device=gpu(), dtype=dtype), config)
        added = torch.randn(512, device=gpu(), dtype=dtype) if bias else None
        room = inputs(m + 1, 1024, dtype)
        shapes = room[:m], room[:m].view(1, m, 1024), room.view(-1)[1 : 1 + m * 1024].view(m, 1024)
        for x in (*shapes, room.expand(2, m + 1, 1024)[:, :1]):
            expected = F.linear(x.detach().requires_grad_(), weight, added)
            with torch.no_grad():
                for _ in range(3):
                    assert torch.equal(F.linear(x, weight, added), expected)
        with torch.no_grad():
            weight.add_(0.25)  # codes change where they lie
            assert torch.equal(F.linear(room[:m], weight), weight_product(room[:m], weight))


def test_bound_products_of_many_weights_at_once_keep_apart() -> None:
    """What launches leave for each other is given back at once: the next product may get the same memory."""
    config = QuantizationConfig(format="int8", int8_threshold=6.0, compute_dtype=None)
    weights = [quantize(torch.randn(512, 1024, device=gpu(), dtype=torch.float16), config) for _ in range(4)]
    inputs_ = [inputs(4, 1024, torch.float16) for _ in range(32)]
    expected = [[weight_product(x, w) for w in weights] for x in inputs_]
    with torch.no_grad():
        for _ in range(3):
            found = [[F.linear(x, w) for w in weights] for x in inputs_]
            assert all(
                torch.equal(a, b)
                for e, f in zip(expected, found, strict=True)
                for a, b in zip(e, f, strict=True)
            )


def weight_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        return F.linear(x.detach().requires_grad_(), weight).detach()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs of CUDA")
@pytest.mark.parametrize("m", [1, 4, 64, 512])
@pytest.mark.parametrize("format", ["nf4", "int8", "llm_int8"])
def test_a_captured_graph_gives_the_same_bits(m: int, format: str) -> None:
    threshold = 6.0 if format == "llm_int8" else None
    config = QuantizationConfig(
        format="nf4" if format == "nf4" else "int8", int8_threshold=threshold, compute_dtype=None
    )
    weight = quantize(torch.randn(512, 1024, device=gpu(), dtype=torch.float16), config)
    x = inputs(m, 1024, torch.float16)
    with torch.no_grad():
        eager = F.linear(x, weight)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            on_side = F.linear(x, weight)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = F.linear(x, weight)
        captured.fill_(torch.nan)
        graph.replay()
    assert torch.equal(eager, on_side)
    assert torch.equal(eager, captured)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_graph_gives_the_same_bits() -> None:
    weight = quantize(torch.randn(512, 1024, device=gpu(), dtype=torch.bfloat16), QuantizationConfig())
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.linear(x, weight), fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        x = inputs(4, 1024, torch.bfloat16)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            result = compiled(x).clone()
        assert torch.equal(result, F.linear(x, weight))
    torch._dynamo.reset()


def test_on_another_device() -> None:
    if torch.accelerator.device_count() < 2:
        pytest.skip("one accelerator only")
    parts, _ = matrix(64, 512, "nf4", 64, True)
    x = inputs(4, 512, torch.bfloat16)

    def run(device: torch.device) -> torch.Tensor:
        moved = [None if t is None else t.to(device) for t in (x, *parts)]
        return OPS.linear_4bit(*moved, None, "nf4", 64, 64, 512, True, x.dtype).cpu()

    first, second = (run(torch.device(x.device.type, i)) for i in (0, 1))
    assert torch.equal(first, second)
