"""What people do with a model besides running it: the same is possible, or refused in words, once it is quantized."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tuckaway
from heavy import ALL, count
from loading import FP32, Net, empty_net, net, tokens
from tuckaway.errors import MismatchError, PagingError
from zoo.harness import CONFIGS, one_thread, outputs, with_weights
from zoo.language_models import LANGUAGE
from zoo.perception_models import PERCEPTION

Loader = Callable[..., nn.Module]


@pytest.fixture(params=["resident", "paged"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def load(tmp_path: Path) -> Loader:
    tuckaway.save_model(net(), tmp_path / "checkpoint")

    def run(kind: str, model: nn.Module | None = None) -> nn.Module:
        place: dict[str, Any] = {"device_map": {"": "cpu"}}
        if kind == "paged":
            place = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "pages"}
        return tuckaway.load_and_quantize_model(model or empty_net(), FP32, tmp_path / "checkpoint", **place)

    return run


def test_training_and_evaluation(load: Loader, kind: str) -> None:
    assert not any(module.training for module in load(kind).modules())
    model = load(kind, empty_net().train()) if kind == "resident" else empty_net()
    assert all(module.training for module in model.train().modules())
    assert not any(module.training for module in model.eval().modules())


def test_what_wants_gradients(load: Loader, kind: str) -> None:
    empty = empty_net()
    empty.norm.requires_grad_(False)
    wants = {name: p.requires_grad for name, p in load(kind, empty).named_parameters()}
    assert not wants["layers.0.up.weight"]
    assert not wants["norm.weight"]
    assert wants["layers.0.up.bias"]
    assert wants["head.weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_have_the_dtype_of_the_rest(load: Loader, tmp_path: Path, dtype: torch.dtype) -> None:
    config = tuckaway.QuantizationConfig(compute_dtype=torch.float32, dtype=dtype)
    model = tuckaway.load_and_quantize_model(
        empty_net(), config, tmp_path / "checkpoint", device_map={"": "cpu"}
    )
    assert model(tokens()).dtype == dtype


def test_hooks_of_users(load: Loader, kind: str) -> None:
    empty, seen = empty_net(), list[str]()
    empty.register_forward_pre_hook(lambda *_: seen.append("model"))
    empty.layers[0].register_forward_hook(lambda *_: seen.append("layer"))
    empty.layers[1].up.register_forward_pre_hook(lambda *_: seen.append("linear"))
    empty.head.register_forward_hook(lambda module, args, output: output * 0)
    assert not load(kind, empty)(tokens()).any()
    assert seen == ["model", "layer", "linear"]


def test_shared_memory(load: Loader) -> None:
    model = load("resident")
    with torch.no_grad():  # a graph that is alive holds on to weights, which torch refuses to exchange then
        expected = model(tokens())
    assert torch.equal(model.share_memory()(tokens()), expected)
    assert all(p.is_shared() for p in model.parameters())
    with pytest.raises(PagingError, match="share_memory"):
        load("paged").share_memory()


def test_copies(load: Loader) -> None:
    model = load("resident")
    expected = model(tokens())
    double = copy.deepcopy(model)
    with torch.no_grad():
        model.layers[0].up.weight.mul_(2)
    assert torch.equal(double(tokens()), expected)
    assert not torch.equal(model(tokens()), expected)
    with pytest.raises(PagingError, match="cannot be copied"):
        copy.deepcopy(load("paged"))


def test_whole_module_through_a_file(load: Loader) -> None:
    model, file = load("resident"), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(tokens()), model(tokens()))
    with pytest.raises(PagingError, match="cannot be copied or pickled"):
        torch.save(load("paged"), io.BytesIO())


def test_data_parallel_is_refused(load: Loader) -> None:
    model = load("resident")
    with pytest.raises(RuntimeError, match="DataParallel cannot copy quantized weights"):
        torch.nn.parallel.comm.broadcast_coalesced(list(model.layers.parameters()), [0, 1])
    assert not model.layers[0].up.weight.is_complex()


def test_exported(load: Loader) -> None:
    model = load("resident")
    program, file = torch.export.export(model, (tokens(),)), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    assert torch.equal(again(tokens()), model(tokens()))
    with pytest.raises(PagingError, match="cannot be exported"):
        torch.export.export(load("paged"), (tokens(),))


def test_traced(load: Loader) -> None:
    model = load("resident")
    with pytest.warns((torch.jit.TracerWarning, DeprecationWarning)):
        traced = torch.jit.trace(model, (tokens(),))
    assert torch.equal(traced(tokens()), model(tokens()))


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop"
)  # of vmap, which goes through the batch one by one
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own jvp
def test_transforms(load: Loader) -> None:
    layer = load("resident").layers[0]
    x = torch.randn(3, 2, 64)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
    value, slope = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(value, layer(x))
    assert slope.isfinite().all()


# Buffers that no checkpoint holds


def test_buffers_are_built_again(load: Loader, kind: str) -> None:
    with tuckaway.init_empty_weights(include_buffers=True):
        empty = Net().eval()
    assert empty.freq.is_meta
    assert torch.equal(load(kind, empty)(tokens()), load("resident")(tokens()))


def test_buffers_that_nobody_knows_are_refused(load: Loader) -> None:
    with torch.device("meta"):
        empty = Net().eval()
    with pytest.raises(MismatchError, match=r"a buffer is in no checkpoint .*freq.*init_empty_weights"):
        load("resident", empty)
    assert empty.freq.is_meta
    empty.freq = 1.0 / (torch.arange(64) + 1.0)
    assert torch.equal(load("resident", empty)(tokens()), load("resident")(tokens()))


# Compiled

REPRESENTATIVE = ["Llama", "GPT2", "Mixtral", "Bert", "T5", "ViT", "ConvNext", "Whisper", "CLIP"]
NOT_COMPILED = {
    "Nystromformer": "does not compile with plain weights either",
    "PatchTST": "does not compile with plain weights either",
    "PaliGemma": "compiled with plain weights it computes something else",
}
OTHERS = [e.name for e in (*LANGUAGE, *PERCEPTION) if e.name not in (*REPRESENTATIVE, *NOT_COMPILED)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_compiled_models(name: str) -> None:
    check_compiled(name)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS[:: count(40, 1 if ALL else 5)])
def test_every_other_model_compiled(name: str) -> None:
    check_compiled(name)


def check_compiled(name: str) -> None:
    entry = next(entry for entry in (*LANGUAGE, *PERCEPTION) if entry.name == name)
    torch._dynamo.reset()
    with one_thread():
        model = tuckaway.load_and_quantize_model(
            with_weights(entry.build), CONFIGS["nf4"], device_map={"": "cpu"}
        )
        arguments = entry.arguments(model)
        expected = outputs(model, arguments)
        compiled = torch.compile(model, backend="aot_eager", dynamic=False)
        found = outputs(compiled, arguments)
    torch._dynamo.reset()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


REACHING = ["DebertaV2", "ProphetNet", "SqueezeBert"]


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REACHING[:: count(3, 1)])
def test_compiled_while_weights_are_used_outside_their_pages(name: str, tmp_path: Path) -> None:
    entry = next(entry for entry in (*LANGUAGE, *PERCEPTION) if entry.name == name)
    torch._dynamo.reset()
    with one_thread():
        tuckaway.save_model(with_weights(entry.build), tmp_path / "checkpoint")
        with tuckaway.init_empty_weights():
            model = entry.build()
        paged = tuckaway.load_and_quantize_model(
            model,
            CONFIGS["nf4"],
            tmp_path / "checkpoint",
            device_map={"": "disk"},
            offload_folder=tmp_path / "pages",
        )
        arguments = entry.arguments(paged)
        expected = outputs(paged, arguments)
        found = outputs(torch.compile(paged, backend="aot_eager", dynamic=False), arguments)
    torch._dynamo.reset()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
