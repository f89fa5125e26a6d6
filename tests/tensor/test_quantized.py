"""QuantizedTensor in the hands of torch: products, gradients, copies, files, compilation.

The definition in every test is the same operation on the dequantized weight.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from tuckaway import ConfigError, QuantizationConfig, QuantizedTensor, quantize

CONFIGS = {
    "nf4": QuantizationConfig(format="nf4", nested=False, compute_dtype=None),
    "nf4-nested": QuantizationConfig(format="nf4", nested=True, compute_dtype=None),
    "fp4-128": QuantizationConfig(format="fp4", nested=False, blocksize=128, compute_dtype=None),
    "int8": QuantizationConfig(format="int8", int8_threshold=None, compute_dtype=None),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> QuantizationConfig:
    return CONFIGS[request.param]


@pytest.fixture
def weight(config: QuantizationConfig) -> QuantizedTensor:
    return quantize(torch.randn(96, 128, generator=torch.Generator().manual_seed(0)), config)


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def linear_with(weight: torch.Tensor) -> nn.Linear:
    torch.manual_seed(1)
    module = nn.Linear(weight.shape[1], weight.shape[0])
    module.weight = frozen(weight)
    return module


class TestWhatItShows:
    def test_four_bit(self) -> None:
        w = quantize(torch.randn(3, 5), QuantizationConfig(format="fp4", nested=True))
        assert (w.format, w.blocksize, w.shape, w.dtype) == ("fp4", 64, (3, 5), torch.float32)
        assert w.codes.shape == (8,)
        assert w.codes.dtype == torch.uint8
        assert w.absmax.shape == (1,)
        assert w.absmax.dtype == torch.float32

    def test_int8(self) -> None:
        w = quantize(torch.randn(3, 5), "int8")
        assert (w.format, w.blocksize, w.codes.dtype, w.codes.shape) == ("int8", 0, torch.int8, (3, 5))
        assert w.absmax.shape == (3,)

    def test_bytes_are_the_components(self, weight: QuantizedTensor) -> None:
        exact = sum(t.numel() * t.element_size() for t in weight.components.values())
        assert weight.nbytes == exact
        assert round(weight.nelement() * weight.element_size()) == exact

    def test_addresses_differ(self, config: QuantizationConfig) -> None:
        a, b = (quantize(torch.randn(64, 64), config) for _ in range(2))
        assert a.data_ptr() != b.data_ptr() != 0

    @pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 4), (7, 3), (2, 3, 5), (1, 1, 1, 9)])
    def test_any_shape(self, shape: tuple[int, ...]) -> None:
        w = quantize(torch.randn(shape), "nf4")
        assert w.dequantize().shape == shape

    def test_unknown_format(self) -> None:
        with pytest.raises(ConfigError, match="nf4"):
            quantize(torch.zeros(2, 2), "nf5")

    def test_integers_are_refused(self) -> None:
        with pytest.raises(TypeError, match="int64"):
            quantize(torch.zeros(2, 2, dtype=torch.int64), "nf4")

    def test_plain_data_is_refused(self) -> None:
        with pytest.raises(TypeError, match="quantize"):
            QuantizedTensor(torch.zeros(2))  # type: ignore[arg-type]

    def test_made_from_itself_it_shares_components(self, weight: QuantizedTensor) -> None:
        again = QuantizedTensor(weight, requires_grad=False)
        assert again.codes.data_ptr() == weight.codes.data_ptr()

    def test_transposed_storage_has_blocks_along_the_input(self, config: QuantizationConfig) -> None:
        w = torch.randn(128, 96)
        turned = quantize(w, config, transposed=True)
        straight = quantize(w.t().contiguous(), config)
        assert torch.equal(turned.codes, straight.codes)
        assert torch.equal(turned.absmax, straight.absmax)
        assert torch.equal(turned.dequantize(), straight.dequantize().t())
        assert turned.shape == (128, 96)


class TestProducts:
    def test_linear_and_its_gradient(self, weight: QuantizedTensor) -> None:
        ours, plain = linear_with(weight), linear_with(weight.dequantize())
        x = torch.randn(3, 5, 128, requires_grad=True)
        (grad,) = torch.autograd.grad(ours(x).square().sum(), x)
        (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
        assert_close(ours(x), plain(x))
        assert_close(grad, expected)

    def test_bias_gets_its_gradient(self, weight: QuantizedTensor) -> None:
        ours = linear_with(weight)
        ours(torch.randn(4, 128)).sum().backward()
        assert_close(ours.bias.grad, torch.full((96,), 4.0))

    @pytest.mark.parametrize(
        "operation",
        [
            lambda w, x, y: y @ w,
            lambda w, x, y: x @ w.t(),
            lambda w, x, y: x @ w.mT,
            lambda w, x, y: x @ w.permute(1, 0),
            lambda w, x, y: w @ x.t(),
            lambda w, x, y: w @ x[0],
            lambda w, x, y: torch.einsum("ij,kj->ik", x, w),
            lambda w, x, y: torch.addmm(torch.ones(96), x, w.t()),
            lambda w, x, y: torch.addmm(torch.ones(7, 96), x, w.t(), beta=2, alpha=3),
            lambda w, x, y: F.linear(x, w[32:64]),
            lambda w, x, y: F.linear(x, w.chunk(3)[1]),
            lambda w, x, y: F.linear(x, w.split([32, 64])[1]),
            lambda w, x, y: w[5],
            lambda w, x, y: w[torch.tensor([[3, 1], [1, 90]])],
            lambda w, x, y: F.embedding(torch.tensor([[3, 1], [1, 90]]), w),
            lambda w, x, y: w * 2 + 1,
            lambda w, x, y: w.sum(0),
            lambda w, x, y: w.float().reshape(-1)[:5],
        ],
    )
    def test_matches_the_dequantized_weight(self, weight: QuantizedTensor, operation) -> None:
        x, y = torch.randn(7, 128), torch.randn(7, 96)
        result = operation(weight, x, y)
        # fp32 sums of 128 products of size 1 in another order
        assert_close(result, operation(weight.dequantize(), x, y), rtol=1e-5, atol=1e-4)

    def test_row_slices_stay_quantized(self, weight: QuantizedTensor) -> None:
        assert isinstance(weight[32:64], QuantizedTensor)
        assert all(isinstance(part, QuantizedTensor) for part in weight.chunk(3))

    def test_stack_of_experts(self, config: QuantizationConfig) -> None:
        stack = quantize(torch.randn(4, 64, 128), config)
        plain, x = stack.dequantize(), torch.randn(4, 5, 128)
        assert isinstance(stack[1], QuantizedTensor)
        assert_close(F.linear(x[1], stack[1]), F.linear(x[1], plain[1]))
        assert_close(torch.bmm(x, stack.transpose(1, 2)), torch.bmm(x, plain.transpose(1, 2)))
        picked = torch.tensor([2, 0])
        assert torch.equal(stack[picked], plain[picked])

    def test_nested_stack_whose_experts_begin_inside_a_group_of_scales(self) -> None:
        stack = quantize(torch.randn(5, 24, 64), CONFIGS["nf4-nested"])  # 24 scales an expert, 256 a group
        for expert in range(5):
            assert torch.equal(stack[expert].dequantize(), stack.dequantize()[expert])

    @pytest.mark.parametrize("train", [True, False])
    def test_multihead_attention(self, config: QuantizationConfig, train: bool) -> None:
        ours = nn.MultiheadAttention(64, 4, batch_first=True).train(train)
        plain = copy.deepcopy(ours)
        packed = quantize(ours.in_proj_weight.detach(), config)
        ours.in_proj_weight, plain.in_proj_weight = frozen(packed), frozen(packed.dequantize())
        x = torch.randn(2, 5, 64)
        with torch.set_grad_enabled(train):
            assert_close(ours(x, x, x)[0], plain(x, x, x)[0])

    def test_convolution(self, config: QuantizationConfig) -> None:
        conv = nn.Conv1d(64, 8, 3)
        packed = quantize(conv.weight.detach(), config)
        x = torch.randn(2, 64, 10)
        conv.weight = frozen(packed.dequantize())
        expected = conv(x)
        conv.weight = frozen(packed)
        assert_close(conv(x), expected)

    def test_autocast(self, weight: QuantizedTensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert linear_with(weight)(torch.randn(2, 128)).dtype == torch.bfloat16

    def test_compute_dtype(self) -> None:
        w = quantize(torch.randn(64, 64), QuantizationConfig(compute_dtype="bf16"))
        x = torch.randn(3, 64)
        expected = F.linear(x.bfloat16(), w.dequantize(torch.bfloat16)).float()
        result = F.linear(x, w)
        assert result.dtype == torch.float32
        assert_close(result, expected, rtol=1e-2, atol=1e-2)

    def test_functional_call_and_checkpointing(self, weight: QuantizedTensor) -> None:
        module = linear_with(weight)
        x = torch.randn(2, 128, requires_grad=True)
        again = torch.func.functional_call(module, dict(module.named_parameters()), (x,))
        assert_close(again, module(x))
        torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False).sum().backward()
        assert_close(x.grad, module.weight.dequantize().sum(0).expand(2, -1))


class TestWrites:
    def test_merging_an_adapter(self, weight: QuantizedTensor) -> None:
        module = linear_with(weight.clone())
        before = module.weight.dequantize()
        module.weight.data += torch.full_like(before, 0.5)
        again = quantize(before + 0.5, QuantizationConfig.of(_config_of(weight)))
        assert torch.equal(module.weight.codes, again.codes)

    def test_data_assignment_reaches_the_components(self, weight: QuantizedTensor) -> None:
        module = linear_with(weight.clone())
        value = torch.randn(96, 128)
        module.weight.data = value
        assert torch.equal(module.weight.codes, quantize(value, _config_of(weight)).codes)
        module.weight.data = weight
        assert torch.equal(module.weight.codes, weight.codes)
        assert isinstance(module.weight, nn.Parameter)

    def test_load_state_dict_from_floats(self, weight: QuantizedTensor) -> None:
        module, value = linear_with(weight.clone()), torch.randn(96, 128)
        module.load_state_dict({"weight": value, "bias": torch.zeros(96)})
        assert torch.equal(module.weight.codes, quantize(value, _config_of(weight)).codes)

    def test_other_in_place_operations_are_refused(self, weight: QuantizedTensor) -> None:
        with pytest.raises(NotImplementedError, match="Dequantize"):
            weight.sin_()


def _config_of(weight: QuantizedTensor) -> QuantizationConfig:
    layout = weight.layout_info
    return QuantizationConfig(
        format=layout.format, nested=layout.nested, blocksize=layout.blocksize or 64, int8_threshold=None
    )


class TestCopiesAndFiles:
    def test_deepcopy(self, weight: QuantizedTensor) -> None:
        module = linear_with(weight)
        twin = copy.deepcopy(module)
        assert isinstance(twin.weight, QuantizedTensor)
        assert isinstance(twin.weight, nn.Parameter)
        assert twin.weight.codes.data_ptr() != weight.codes.data_ptr()
        assert torch.equal(twin.weight.codes, weight.codes)

    def test_state_dict_through_a_file(self, weight: QuantizedTensor) -> None:
        module, file = linear_with(weight), io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        empty = nn.Linear(128, 96, device="meta")
        empty.load_state_dict(state, assign=True)
        x = torch.randn(2, 128)
        assert torch.equal(empty(x), module(x))

    def test_whole_module_through_a_file(self, weight: QuantizedTensor) -> None:
        module, file = linear_with(weight), io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        assert isinstance(again.weight, nn.Parameter)
        x = torch.randn(2, 128)
        assert torch.equal(again(x), module(x))

    def test_another_dtype_keeps_the_bytes(self, weight: QuantizedTensor) -> None:
        module = linear_with(weight).to(torch.bfloat16)
        assert module.weight.dtype == torch.bfloat16
        assert torch.equal(module.weight.codes, weight.codes)
        assert module(torch.randn(2, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16

    def test_meta(self, weight: QuantizedTensor) -> None:
        module = linear_with(weight).to("meta")
        assert module.weight.is_meta
        assert module.weight.format == weight.format

    def test_shared_memory(self, weight: QuantizedTensor) -> None:
        assert not weight.is_shared()
        assert weight.share_memory_().is_shared()

    def test_likes_are_plain(self, weight: QuantizedTensor) -> None:
        for make in (torch.zeros_like, torch.empty_like, torch.ones_like):
            assert type(make(weight)) is torch.Tensor
            assert make(weight).shape == weight.shape


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_whole_graph_with_gradient(self, weight: QuantizedTensor) -> None:
        module = linear_with(weight)

        def loss(x: torch.Tensor) -> torch.Tensor:
            return torch.relu(module(x)).sum() + (module.weight @ x[0].t()).sum()

        x = torch.randn(2, 3, 128, requires_grad=True)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), loss(x))
        (grad,) = torch.autograd.grad(compiled(x), x)
        (expected,) = torch.autograd.grad(loss(x), x)
        assert_close(grad, expected)

    def test_whole_graph_without_gradient(self, weight: QuantizedTensor) -> None:
        module, x = linear_with(weight), torch.randn(2, 128)
        with torch.no_grad():
            assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
