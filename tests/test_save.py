"""What is written: the same bytes wherever the weights lie, and what bitsandbytes and transformers read in them."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import tuckaway
from loading import (
    FORMATS,
    FP32,
    assert_same_bits,
    assert_same_state,
    decoded_by_bitsandbytes,
    empty_net,
    net,
    read_all,
    refused,
    tiny_llama_config,
    tokens,
)
from tuckaway import QuantizationConfig, QuantizedTensor, load_and_quantize_model, save_model
from tuckaway.errors import ConfigError, PagingError

PLACES: dict[str, Any] = {
    "resident": None,
    "disk": {"": "disk"},
    "mixed": {"": "cpu", "layers.1": "disk", "head": "disk", "norm": "disk"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net")
    save_model(net(), path)
    return path


def load(
    location: Path, config: Any = FP32, place: Any = None, store: Path | None = None, **options: Any
) -> Any:
    model = empty_net(**options)
    return load_and_quantize_model(model, config, location, place, ["Layer"], offload_folder=store)


def assert_same_values(a: torch.Tensor, b: torch.Tensor) -> None:
    """As `assert_same_bits`, but for the sign of zero: bitsandbytes' CPU code decodes fp4's code 8 to +0.0."""
    assert_same_bits(a + 0.0, b + 0.0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


# The same bytes


@pytest.mark.parametrize("config", [None, *FORMATS, "nf4-plain"])
def test_wherever_the_weights_lie_the_files_are_equal(
    config: str | None, source: Path, tmp_path: Path
) -> None:
    written = []
    for name, place in PLACES.items():
        store = tmp_path / f"store-{name}"
        if config is None:
            model = tuckaway.load_checkpoint_and_dispatch(empty_net(), source, place, offload_folder=store)
        else:
            format, _, plain = config.partition("-")
            model = load(source, FP32.replace(format=format, nested=not plain, skip_modules=[]), place, store)
        with torch.no_grad():
            logits = model(tokens())
        for size in ("10GB", 40_000):
            save_model(model, tmp_path / f"{name}-{size}", size)
        with torch.no_grad():
            assert torch.equal(model(tokens()), logits)  # saving is no turn of a page
        written.append([contents(tmp_path / f"{name}-{size}") for size in ("10GB", 40_000)])
        again = load(tmp_path / f"{name}-40000", FP32 if config else FP32.replace(skip_modules=["layers"]))
        if config is not None:
            with torch.no_grad():
                assert torch.equal(again(tokens()), logits)
    assert written[0] == written[1] == written[2]
    assert len(written[0][0]) == 1
    assert len(written[0][1]) >= 3  # two shards or more, and their index


def test_saving_what_was_saved_changes_nothing(source: Path, tmp_path: Path) -> None:
    for config in (FP32, QuantizationConfig("int8"), QuantizationConfig("fp4", nested=False, blocksize=128)):
        first, second = tmp_path / f"{config.format}-1", tmp_path / f"{config.format}-2"
        save_model(load(source, config), first)
        save_model(load(first, config), second)
        assert contents(first) == contents(second)
        assert_same_state(load(second, config), load(source, config))


def test_an_unquantized_model_is_its_state_dict(tmp_path: Path) -> None:
    model = net()
    save_model(model, tmp_path)
    state, read = model.state_dict(), read_all(tmp_path)
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert_same_bits(read[name], tensor)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"  # transformers refuses files without it


def test_shards_and_their_index(source: Path, tmp_path: Path) -> None:
    model = load(source)
    save_model(model, tmp_path, "30kB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    read = read_all(tmp_path)
    assert set(index["weight_map"]) == set(read)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read.values())
    for name in files:
        with safe_open(tmp_path / name, "pt") as file:
            sizes = [file.get_tensor(key).nbytes for key in file.keys()]  # noqa: SIM118
        assert sum(sizes) <= 30_000 or len(sizes) == 1


def test_fewer_shards_leave_no_old_ones(source: Path, tmp_path: Path) -> None:
    model = load(source)
    for size in ("20kB", "60kB", "1GB", "20kB"):
        save_model(model, tmp_path, size)
        assert_same_state(load(tmp_path), model)
        total = len(list(tmp_path.glob("*.safetensors")))
        assert total == 1 or all(f"-of-{total:05}" in p.name for p in tmp_path.glob("*.safetensors"))
        assert (tmp_path / "model.safetensors.index.json").exists() == (total > 1)


@pytest.mark.parametrize("size", ["10GB", "30kB"])
def test_over_the_checkpoint_it_was_loaded_from_and_the_folder_it_is_paged_from(
    size: str, source: Path, tmp_path: Path
) -> None:
    save_model(net(), tmp_path)
    model = load(tmp_path, FP32, PLACES["mixed"], tmp_path)  # checkpoint and pages in one folder
    with torch.no_grad():
        logits = model(tokens())
    for _ in range(2):
        save_model(model, tmp_path, size)
        with torch.no_grad():
            assert torch.equal(model(tokens()), logits)
    assert (tmp_path / "pages.bin").exists()
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(tokens()), logits)
    tuckaway.materialize(model)
    assert_same_state(model, load(source))


@pytest.mark.parametrize("quantized", [False, True])
def test_ties_are_written_once(quantized: bool, tmp_path: Path) -> None:
    save_model(net(tied=True), tmp_path / "source")
    config = FP32.replace(skip_modules=[], quantize_embeddings=quantized)
    for name, place in PLACES.items():
        model = load(tmp_path / "source", config, place, tmp_path / f"store-{name}", tied=True)
        save_model(model, tmp_path / name)
        read = read_all(tmp_path / name)
        assert "embed.weight" in read
        assert not any(key.startswith("head.weight") for key in read)
        again = load(tmp_path / name, config, tied=True)
        assert again.head.weight is again.embed.weight
        with torch.no_grad():
            assert torch.equal(again(tokens()), model(tokens()))


class Odd(nn.Module):
    """Shapes at the edge, buffers of both kinds, a shared module, views of one storage."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.turned = nn.Parameter(torch.randn(5, 7).t())
        both = torch.randn(2, 6)
        self.register_buffer("first", both[0])
        self.register_buffer("second", both[1])
        self.register_buffer("expanded", torch.ones(1).expand(4))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.register_buffer("none", None)
        self.a = nn.Linear(3, 3)
        self.b = self.a


def test_odd_tensors(tmp_path: Path) -> None:
    model = Odd()
    save_model(model, tmp_path)
    read, state = read_all(tmp_path), model.state_dict()
    assert set(state) - set(read) == {"b.weight", "b.bias"}
    assert all(torch.equal(read[name], state[name]) for name in read)
    assert_same_state(tuckaway.load_checkpoint_and_dispatch(Odd(), tmp_path, strict=True), model)


# What is refused


def test_a_model_that_was_never_loaded(tmp_path: Path) -> None:
    for folder in (tmp_path / "new", tmp_path):
        with refused(
            PagingError, r"'embed\.weight' is on the meta device and in no page", model := empty_net(), folder
        ):
            save_model(model, folder)
        with refused(PagingError, "in no page", model := empty_net(), folder):
            save_model(model, folder, "1kB")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_refused_save_leaves_the_old_checkpoint(source: Path, tmp_path: Path) -> None:
    save_model(load(source), tmp_path, "30kB")
    before = contents(tmp_path)
    with pytest.raises(PagingError):
        save_model(empty_net(), tmp_path)
    half = net()
    half.norm.weight = nn.Parameter(torch.empty(64, device="meta"))
    with pytest.raises(PagingError, match=r"'norm\.weight'"):
        save_model(half, tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("size", ["10", "ten GB", -1, 0, "-5GB", None, 1.5])
def test_shard_sizes_that_are_none(size: Any, tmp_path: Path) -> None:
    with refused((ValueError, TypeError, AttributeError), "size|strip|holds|int", model := net(), tmp_path):  # type: ignore[arg-type]
        save_model(model, tmp_path, size if size != "10" else "10 parsecs")


def test_pickles_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pickled checkpoints are not written"):
        save_model(net(), tmp_path, safe_serialization=False)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(OSError, match="file"):
        save_model(net(), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"


# transformers and bitsandbytes


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama_config()).save_pretrained(path)
    return path


def quantized_llama(folder: Path, config: QuantizationConfig, **options: Any) -> Any:
    from transformers import LlamaForCausalLM

    with tuckaway.init_empty_weights():
        model = LlamaForCausalLM(tiny_llama_config()).eval()
    return load_and_quantize_model(model, config, folder, **options)


CONFIGS = [
    QuantizationConfig("nf4", dtype="fp32"),
    QuantizationConfig("nf4", nested=False, blocksize=128, compute_dtype="fp32"),
    QuantizationConfig("fp4", compute_dtype="bf16"),
    QuantizationConfig("int8", nested=False, compute_dtype="fp16", int8_threshold=3.0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.format}-{c.blocksize}")
def test_transformers_with_bitsandbytes_reads_the_same_weights(
    config: QuantizationConfig, llama: Path, tmp_path: Path
) -> None:
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM

    for place in ("cpu", "disk"):
        folder = tmp_path / place
        model = quantized_llama(llama, config, device_map=place, offload_folder=tmp_path / "store")
        save_model(model, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
        tuckaway.materialize(model)
        read = read_all(folder)
        quantized = 0
        for name, ours in model.named_parameters():
            other = theirs.get_parameter(name)
            if not isinstance(ours, QuantizedTensor):
                assert_same_bits(other.detach(), ours.detach())
                continue
            quantized += 1
            # before any forward: bitsandbytes repacks the weights in place on its first one
            module = theirs.get_submodule(name.rpartition(".")[0])
            if config.format == "int8":
                assert isinstance(module, bnb.nn.Linear8bitLt)
                assert torch.equal(other.data, ours.codes)
                assert torch.equal(module.weight.SCB, ours.absmax)
                assert module.state.threshold == 3.0
                continue
            assert isinstance(module, bnb.nn.Linear4bit)
            assert torch.equal(other.data.reshape(-1), ours.codes)
            assert other.quant_state.blocksize == config.blocksize
            assert other.quant_state.quant_type == config.format
            assert tuple(other.quant_state.shape) == ours.shape
            assert module.compute_dtype == config.compute_dtype
            stats = {
                k.removeprefix(name.removesuffix("weight")): v for k, v in read.items() if k.startswith(name)
            }
            assert_same_values(decoded_by_bitsandbytes(stats), ours.dequantize(ours.layout_info.dtype))
            if math.prod(ours.shape[1:]) % config.blocksize == 0:  # their CPU code is wrong for other rows
                decoded = bnb.functional.dequantize_4bit(other.data, other.quant_state)
                assert_same_values(decoded, ours.dequantize(decoded.dtype))
        assert quantized == 14


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.format}-{c.blocksize}")
def test_what_transformers_with_bitsandbytes_saves_is_read(
    config: QuantizationConfig, llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    read = {k: v for k, v in config.to_bitsandbytes().items() if k != "quant_method"}
    given = BitsAndBytesConfig(**read)
    theirs = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=given, device_map="cpu", dtype="float32"
    )
    theirs.save_pretrained(tmp_path)
    before = copy.deepcopy(given.to_dict())
    state = read_all(tmp_path)
    for asked in (None, given):  # what config.json says, and the object itself
        ours = quantized_llama(tmp_path, asked)
        assert given.to_dict() == before
        weights = {n: p for n, p in ours.named_parameters() if isinstance(p, QuantizedTensor)}
        assert len(weights) == 14
        for name, weight in weights.items():
            assert weight.format == config.format
            assert torch.equal(weight.codes.reshape(-1), state[name].reshape(-1))
            if config.format == "int8":
                assert torch.equal(weight.absmax, state[name.replace("weight", "SCB")])
                assert weight.layout_info.int8_threshold == 3.0
            else:
                head = name.removesuffix("weight")
                stats = {k.removeprefix(head): v for k, v in state.items() if k.startswith(name)}
                assert_same_values(
                    weight.dequantize(weight.layout_info.dtype), decoded_by_bitsandbytes(stats)
                )
        save_model(ours, tmp_path / "again")
        again = read_all(tmp_path / "again")
        assert again.keys() == state.keys()
        for name in again:
            if any(name.startswith(n) or n.removesuffix("weight") in name for n in weights):
                assert_same_bits(again[name], state[name])


def test_config_json(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    for config in CONFIGS:
        folder = tmp_path / f"{config.format}{config.blocksize}"
        model = quantized_llama(llama, config)
        before = model.config.to_dict()
        save_model(model, folder)
        assert model.config.to_dict() == before
        content = json.loads((folder / "config.json").read_text())
        assert content["architectures"] == ["LlamaForCausalLM"]
        assert content["dtype"] == str(config.plain_dtype).removeprefix("torch.")
        assert content["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
        assert QuantizationConfig.of(content["quantization_config"]) == config.replace(
            dtype=None,
            skip_modules=["lm_head"],
            compute_dtype=config.compute_dtype,
        )
        assert AutoConfig.from_pretrained(folder).hidden_size == 64
        assert (folder / "generation_config.json").exists()
        for name, weight in quantized_llama(folder, None).named_parameters():
            if isinstance(weight, QuantizedTensor):
                expected = model.get_parameter(name)
                assert weight.layout_info == expected.layout_info
                assert_same_bits(weight.to(expected.dtype), expected)
    plain = LlamaForCausalLM(tiny_llama_config())
    save_model(plain, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    assert_same_state(again, plain)


def test_a_plain_model_has_no_config(source: Path, tmp_path: Path) -> None:
    save_model(load(source), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_two_formats_in_one_checkpoint(tmp_path: Path, llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = quantized_llama(llama, FP32)
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(
        tuckaway.quantize(weight.dequantize(), FP32.replace(format="int8")), requires_grad=False
    )
    with caplog.at_level(logging.WARNING, "tuckaway"):
        save_model(model, tmp_path)
    assert "formats ['int8', 'nf4'] lie in one checkpoint" in caplog.text
    again = quantized_llama(tmp_path, FP32)
    assert_same_state(again, model)
