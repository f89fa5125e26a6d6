"""The main job: every kind of checkpoint, placement, config and model, with real files and real libraries."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import logging
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tuckaway
from loading import (
    FORMATS,
    FP32,
    Net,
    assert_same_bits,
    assert_same_state,
    decoded_by_bitsandbytes,
    edit,
    empty_net,
    net,
    quantized_names,
    read_all,
    tiny_llama_config,
    tokens,
)
from tuckaway import QuantizationConfig, QuantizedTensor, load_and_quantize_model
from tuckaway.errors import CheckpointError, ConfigError, MismatchError, PagingError, PlanError

LAYER = ["Layer"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network in shards with an index."""
    path = tmp_path_factory.mktemp("net")
    tuckaway.save_model(net(), path, max_shard_size="60kB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


def load(location: Path | str | None, config: Any = FP32, model: Any = None, **options: Any) -> Any:
    options.setdefault("no_split_module_classes", LAYER)
    model = empty_net() if model is None else model
    return load_and_quantize_model(model, config, location, **options)


# Where a checkpoint may lie


def pickled(folder: Path, shards: int, tmp_path: Path) -> Path:
    state = read_all(folder)
    names = list(state)
    weight_map = {}
    for number in range(shards):
        part = names[number::shards]
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin" if shards > 1 else "pytorch_model.bin"
        torch.save({name: state[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize("kind", ["file", "index", "folder", "string", "bin", "sharded bin", "bin folder"])
def test_every_kind_of_location_gives_the_same_model(
    kind: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    location: Path | str
    if kind == "file":
        location = tmp_path / "one.safetensors"
        save_file(read_all(folder), location)
    elif kind == "index":
        location = folder / "model.safetensors.index.json"
    elif kind in ("folder", "string"):
        location = folder if kind == "folder" else str(folder)
    elif kind == "sharded bin":
        location = pickled(folder, 3, tmp_path)
    else:
        location = pickled(folder, 1, tmp_path)
        if kind == "bin":
            location /= "pytorch_model.bin"
    assert_same_state(load(location), load(folder))
    assert ("weights_only" in caplog.text) == ("bin" in kind)


def test_safetensors_win_where_both_lie(folder: Path, tmp_path: Path) -> None:
    save_file(read_all(folder), tmp_path / "model.safetensors")
    torch.save(
        {name: torch.full_like(t, 7.0) for name, t in read_all(folder).items()},
        tmp_path / "pytorch_model.bin",
    )
    assert_same_state(load(tmp_path), load(folder))


def test_weights_are_quantized_from_the_dtype_they_are_seen_in(folder: Path) -> None:
    for dtype, compute in itertools.product(
        ["float32", "bfloat16", "float16", None], ["float32", "bfloat16"]
    ):
        config = QuantizationConfig(dtype=dtype, compute_dtype=compute)
        seen = config.plain_dtype
        assert seen is not None
        model, source = load(folder, config), read_all(folder)
        name = "layers.1.up.weight"
        assert_same_bits(model.get_parameter(name).data, tuckaway.quantize(source[name].to(seen), config))
        assert model.layers[0].up.weight.layout_info.compute_dtype == config.compute_dtype
        assert {p.dtype for p in model.parameters()} == {seen}
        assert model.shift.dtype == seen
        assert torch.equal(model.embed.weight, source["embed.weight"].to(seen))


# Placement


def placements(folder: Path) -> dict[str, dict[str, Any]]:
    specs = tuckaway.memory_footprint(load(folder))
    return {
        "none": {},
        "cpu": {"device_map": "cpu"},
        "auto": {"device_map": "auto"},
        "balanced": {"device_map": "balanced"},
        "balanced_low_0": {"device_map": "balanced_low_0"},
        "sequential": {"device_map": "sequential"},
        "disk": {"device_map": "disk"},
        "everything": {"device_map": {"": "disk"}},
        "device": {"device_map": torch.device("cpu")},
        "mixed": {
            "device_map": {"embed": "cpu", "layers": "disk", "norm": "cpu", "head": "disk", "shift": "cpu"},
        },
        "by layer": {
            "device_map": {
                "": "cpu",
                "layers.0": "disk",
                "layers.1.up": "disk",
                "layers.2.w": "disk",
                "head": "disk",
            },
            "no_split_module_classes": None,
        },
        "small": {"device_map": "auto", "max_memory": {"cpu": int(specs * 0.8)}},
        "buffers": {"device_map": {"": "disk"}, "offload_buffers": True},
    }


NAMES = [
    "none", "cpu", "auto", "balanced", "balanced_low_0", "sequential", "disk", "everything", "device", "mixed",
    "by layer", "small", "buffers",
]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_every_placement_gives_the_same_bits(format: str, folder: Path, tmp_path: Path) -> None:
    config = FP32.replace(format=format)
    kinds = placements(folder)
    assert list(kinds) == NAMES
    expected, logits = load(folder, config), None
    for name, options in kinds.items():
        model = load(folder, config, offload_folder=tmp_path / name, **options)
        with torch.no_grad():
            first, second = model(tokens()), model(tokens())
        logits = first if logits is None else logits
        assert torch.equal(first, logits), name
        assert torch.equal(second, logits), name
        on_disk = "disk" in {str(place) for place in model.hf_device_map.values()}
        assert on_disk == (name in ("disk", "everything", "mixed", "by layer", "small", "buffers")), name
        assert any(p.is_meta for p in model.parameters()) == on_disk, name
        assert_same_state(tuckaway.materialize(model), expected)
    assert torch.isfinite(logits).all()


def test_a_store_is_used_again_for_the_same_weights_only(folder: Path, tmp_path: Path) -> None:
    options = {"device_map": {"": "disk"}, "offload_folder": tmp_path}
    tuckaway.materialize(load(folder, **options))
    pages = tmp_path / "pages.bin"
    stamp = pages.stat().st_mtime_ns
    again = load(folder, **options)
    assert pages.stat().st_mtime_ns == stamp
    with torch.no_grad():
        assert torch.equal(again(tokens()), load(folder)(tokens()))
    tuckaway.materialize(again)


def test_what_the_model_kept_belongs_to_the_identity_of_its_pages(folder: Path, tmp_path: Path) -> None:
    state = read_all(folder)
    del state["norm.weight"]
    save_file(state, tmp_path / "model.safetensors")
    store = tmp_path / "store"

    def loaded(scale: float) -> Any:
        model = net()
        nn.init.constant_(model.norm.weight, scale)
        return load(tmp_path, model=model, strict=False, device_map={"": "disk"}, offload_folder=store)

    for _ in range(2):  # the second time from the pages of the first
        model = tuckaway.materialize(loaded(3.0))
        assert torch.equal(model.norm.weight, torch.full((64,), 3.0))
    with pytest.raises(tuckaway.StoreStale):
        loaded(4.0)


def test_a_loaded_model_can_be_placed_again(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        expected = model(tokens())
        paged = tuckaway.disk_offload(model, tmp_path)
        assert paged is model
        assert torch.equal(paged(tokens()), expected)
        with pytest.raises(PagingError, match="paged already"):
            tuckaway.dispatch_model(model, {"": "cpu"})
        assert torch.equal(paged(tokens()), expected)
        tuckaway.materialize(paged)
        assert torch.equal(tuckaway.cpu_offload(paged)(tokens()), expected)


# What is quantized, and what is not


def test_head_and_embedding_stay_and_the_rest_does_not(folder: Path) -> None:
    expected = {f"layers.{i}.{n}" for i in range(3) for n in ("up.weight", "down.weight", "w")}
    assert quantized_names(load(folder)) == expected
    assert quantized_names(load(folder, FP32.replace(skip_modules=[]))) == expected | {"head.weight"}
    asked = FP32.replace(skip_modules=[], quantize_embeddings=True)
    assert quantized_names(load(folder, asked)) == expected | {"head.weight", "embed.weight"}


def test_skip_modules_and_keep_in_fp32_modules(folder: Path) -> None:
    config = QuantizationConfig(
        skip_modules=["layers.0", "down", "*.2.w"], keep_in_fp32_modules=["norm", "shift"]
    )
    model = load(folder, config)
    assert quantized_names(model) == {"layers.1.up.weight", "layers.1.w", "layers.2.up.weight", "head.weight"}
    fp32 = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert fp32 == {n for n, _ in net().named_parameters() if "norm" in n}
    assert model.shift.dtype == torch.float32
    assert model.layers[0].up.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["lm_haed", "layers.3", "layer"])
def test_our_own_names_must_match(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' in skip_modules matches nothing"):
        load(folder, FP32.replace(skip_modules=[name]))


def test_embeddings_are_looked_up_quantized(folder: Path, tmp_path: Path) -> None:
    for format in FORMATS:
        config = FP32.replace(format=format, quantize_embeddings=True, skip_modules=[])
        model = load(folder, config)
        rows = model.embed(torch.tensor([[0, 95, 3], [3, 3, 1]]))
        assert torch.equal(rows, model.embed.weight.dequantize()[torch.tensor([[0, 95, 3], [3, 3, 1]])])
        paged = load(folder, config, device_map={"": "disk"}, offload_folder=tmp_path / format)
        with torch.no_grad():
            assert torch.equal(paged(tokens()), model(tokens()))


def test_the_report_says_why(folder: Path) -> None:
    model = load(folder)
    text = str(model.quantization_report)
    assert "head" in text
    assert "embed" in text


# Configs of others


def test_configs_of_accelerate_and_transformers_are_not_changed(folder: Path) -> None:
    from accelerate.utils import BnbQuantizationConfig
    from transformers import BitsAndBytesConfig

    for given, expected in [
        (
            BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", torch_dtype=torch.float32),
            QuantizationConfig(nested=False, compute_dtype="fp16", dtype="fp32"),
        ),
        (
            BnbQuantizationConfig(load_in_8bit=True),
            QuantizationConfig("int8", nested=False, compute_dtype="fp16"),
        ),
        (
            BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["head", "lm_head"]
            ),
            QuantizationConfig(nested=False, compute_dtype="fp32", skip_modules=["head"]),
        ),
        (
            BitsAndBytesConfig(load_in_8bit=True).to_dict(),
            QuantizationConfig("int8", nested=False, compute_dtype="fp16"),
        ),
    ]:
        before = copy.deepcopy(getattr(given, "__dict__", given))
        for keyword in ("quantization_config", "bnb_quantization_config"):
            model = load_and_quantize_model(empty_net(), weights_location=folder, **{keyword: given})
            assert_same_state(model, load(folder, expected))
        assert getattr(given, "__dict__", given) == before


def test_config_none_is_what_the_checkpoint_says_or_the_default(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert_same_state(load(tmp_path, None), load(folder, QuantizationConfig()))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"load_in_8bit": True}}))
    assert_same_state(load(tmp_path, None), load(folder, {"load_in_8bit": True}))
    edit(tmp_path / "config.json", lambda c: c.update(quantization_config={"quant_method": "awq", "bits": 4}))
    with pytest.raises(ConfigError, match="'awq' are not known"):
        load(tmp_path, None)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path, None)


# Models that have their weights


def test_a_real_model_is_quantized_in_place() -> None:
    for config in (FP32, FP32.replace(format="int8"), QuantizationConfig(keep_in_fp32_modules=["norm"])):
        model, source = net(), net()
        embedding, buffer = model.embed.weight, model.freq
        assert load(None, config, model=model) is model
        for name, tensor in source.named_parameters():
            found = model.get_parameter(name)
            if isinstance(found, QuantizedTensor):
                assert_same_bits(
                    found.data, tuckaway.quantize(tensor.detach().to(config.plain_dtype), config)
                )
            else:
                wanted = (
                    torch.float32 if "norm" in name and config.keep_in_fp32_modules else config.plain_dtype
                )
                assert torch.equal(found, tensor.to(wanted))
        assert model.freq is buffer
        assert (model.embed.weight is embedding) == (config.plain_dtype == torch.float32)


@pytest.mark.parametrize("config", [FP32, QuantizationConfig()], ids=["fp32", "bf16"])
def test_a_real_model_is_placed_by_a_device_map(config: QuantizationConfig, tmp_path: Path) -> None:
    expected = load(None, config, model=net())
    for number, (device_map, buffers) in enumerate(
        itertools.product([{"": "disk"}, {"": "cpu", "layers.1": "disk", "norm": "disk"}], [False, True])
    ):
        options = {
            "device_map": device_map,
            "offload_folder": tmp_path / str(number),
            "offload_buffers": buffers,
        }
        model = load(None, config, model=net(), **options)
        with torch.no_grad():
            assert torch.equal(model(tokens()), expected(tokens()))
        assert_same_state(tuckaway.materialize(model), expected)


def test_quantizing_twice_changes_nothing() -> None:
    model = load(None, FP32, model=net())
    once = copy.deepcopy(model)
    again = load(None, FP32.replace(format="int8", dtype="fp32"), model=model)
    assert_same_state(again, once)


# Modules, buffers, hooks, modes


def test_modes_gradients_and_buffers(folder: Path) -> None:
    for mode in (True, False):
        model = empty_net().train(mode)
        model.layers[1].train(not mode)
        model.norm.weight.requires_grad_(False)
        model = load(folder, model=model)
        assert [m.training for m in (model, model.layers[0], model.layers[1])] == [mode, mode, not mode]
        assert not model.norm.weight.requires_grad
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (name not in quantized_names(model) | {"norm.weight"}), name
            assert type(parameter) in (nn.Parameter, QuantizedTensor)
            assert isinstance(parameter, nn.Parameter)
        assert torch.equal(model.freq, net().freq)
        assert torch.equal(model.shift, net().shift)


@pytest.mark.parametrize("paged", [False, True])
def test_hooks_of_users_still_run(folder: Path, tmp_path: Path, paged: bool) -> None:
    model, seen = empty_net(), []
    handles = [
        model.register_forward_pre_hook(lambda *_: seen.append("before")),
        model.layers[1].register_forward_hook(lambda m, _, y: seen.append(m.up.weight.device.type)),
        model.layers[1].up.register_forward_hook(lambda *_: seen.append("inside")),
        model.register_forward_hook(lambda *_: seen.append("after")),
    ]
    options = {"device_map": {"": "disk"}, "offload_folder": tmp_path} if paged else {}
    model = load(folder, model=model, **options)
    with torch.no_grad():
        model(tokens())
    assert seen == ["before", "inside", "cpu", "after"]
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        model(tokens())
    assert len(seen) == 4


def test_gradient_flows_to_what_is_plain(folder: Path, tmp_path: Path) -> None:
    grads = []
    for options in ({}, {"device_map": {"": "cpu", "layers.1": "disk"}, "offload_folder": tmp_path}):
        model = empty_net().requires_grad_(False)  # what is paged cannot keep a gradient
        model.embed.requires_grad_(True)
        model = load(folder, model=model, **options)
        model(tokens()).sum().backward()
        grads.append(model.embed.weight.grad)
    assert_same_bits(*grads)
    assert grads[0].abs().sum() > 0


class Shared(nn.Module):
    """One module under two names, one parameter under three, and a parameter called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = self.a
        self.c = nn.Linear(64, 64)
        self.c.weight = self.a.weight
        self.out = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.c(self.b(self.a(x))))


def test_shared_modules_and_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = Shared()
    tuckaway.save_model(source, tmp_path)
    assert set(read_all(tmp_path)) == {"a.weight", "a.bias", "c.bias", "out.weight", "out.bias"}
    logits = []
    for options in ({}, {"device_map": {"": "disk"}, "offload_folder": tmp_path / "store"}):
        with tuckaway.init_empty_weights():
            model = Shared()
        model = load(tmp_path, model=model, **options)
        assert model.a is model.b
        assert model.a.weight is model.c.weight
        with torch.no_grad():
            logits.append(model(torch.randn(2, 64, generator=torch.Generator().manual_seed(0))))
    assert torch.equal(*logits)


class Scalars(nn.Module):
    """Shapes at the edge: 0-d, empty, one element, odd, three-dimensional, integers and booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.nothing = nn.Parameter(torch.empty(0, 64))
        self.experts = nn.Parameter(torch.randn(3, 33, 65))
        self.odd = nn.Linear(33, 37)
        self.steps = nn.Parameter(torch.arange(5), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("none", None)


@pytest.mark.parametrize("format", FORMATS)
def test_edge_shapes(format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = Scalars()
    tuckaway.save_model(source, tmp_path)
    config = FP32.replace(format=format, skip_modules=[])
    states = []
    for options in (
        {},
        {"device_map": {"": "disk"}, "offload_folder": tmp_path / "store", "offload_buffers": True},
    ):
        with tuckaway.init_empty_weights(include_buffers=True):
            model = Scalars()
        states.append(tuckaway.materialize(load(tmp_path, config, model=model, **options)))
    assert_same_state(*states)
    model = states[0]
    assert quantized_names(model) == {"experts", "odd.weight"}
    assert torch.equal(model.experts.dequantize(), tuckaway.quantize(source.experts, config).dequantize())
    for name in ("temperature", "nothing", "steps", "mask", "count"):
        assert torch.equal(getattr(model, name), getattr(source, name))
    assert not model.steps.requires_grad
    assert model.none is None


# Ties


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("quantized", [False, True])
def test_tied_stay_tied(copies: int, quantized: bool, tmp_path: Path) -> None:
    source = net(tied=True)
    state = {name: t.clone() for name, t in source.state_dict().items()}
    if copies == 1:
        del state["embed.weight"]
    save_file(state, tmp_path / "model.safetensors")
    config = FP32.replace(skip_modules=[], quantize_embeddings=quantized)
    logits = []
    for number, device_map in enumerate(
        [None, {"": "disk"}, {"": "cpu", "head": "disk"}, {"": "cpu", "embed": "disk"}]
    ):
        model = load(
            tmp_path,
            config,
            model=empty_net(tied=True),
            device_map=device_map,
            offload_folder=tmp_path / str(number),
        )
        assert model.head.weight is model.embed.weight
        assert isinstance(model.head.weight, QuantizedTensor) == quantized
        with torch.no_grad():
            logits.append(model(tokens()))
        assert torch.equal(logits[-1], logits[0])
        tuckaway.materialize(model)
        assert model.head.weight is model.embed.weight
        assert_same_bits(model.embed.weight, model.head.weight)


def test_unequal_copies_of_a_tied_weight_are_refused(tmp_path: Path) -> None:
    state = {name: t.clone() for name, t in net(tied=True).state_dict().items()}
    state["head.weight"][-1, -1] += 1e-3
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        MismatchError, match=r"'embed\.weight' and 'head\.weight' are one weight in the model"
    ):
        load(tmp_path, model=empty_net(tied=True))
    model = load(tmp_path)  # a model that does not tie them has both
    assert not torch.equal(model.embed.weight, model.head.weight)


# transformers


def test_llama(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    for tied in (False, True):
        config = tiny_llama_config(tie_word_embeddings=tied)
        folder = tmp_path / str(tied)
        torch.manual_seed(0)
        source = LlamaForCausalLM(config).eval()
        source.save_pretrained(folder)
        expected = logits = None
        for number, device_map in enumerate(["cpu", {"": "disk"}, {"": "cpu", "model.layers.1": "disk"}]):
            with tuckaway.init_empty_weights():
                model = LlamaForCausalLM(config).eval()
            model = load_and_quantize_model(
                model, FP32, folder, device_map=device_map, offload_folder=folder / f"store{number}"
            )
            # computed in the constructor and in no checkpoint: right directly after loading
            frequencies = model.model.rotary_emb.inv_freq
            assert torch.equal(frequencies, source.model.rotary_emb.inv_freq)
            assert frequencies.dtype == torch.float32
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
            ids = tokens(128)
            with torch.no_grad():
                found = model(ids).logits
                written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
            expected, logits = (written, found) if expected is None else (expected, logits)
            assert torch.equal(written, expected)
            assert torch.equal(found, logits)
        assert written.shape == (2, 15)
        with torch.no_grad():
            assert (found - source(ids).logits).abs().mean() < 0.2 * source(ids).logits.abs().mean()


def test_conv1d_is_quantized_along_its_inputs(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=32)
    torch.manual_seed(0)
    source = GPT2LMHeadModel(config).eval()
    source.save_pretrained(tmp_path)
    ids = tokens(128)
    for format in FORMATS:
        options = FP32.replace(format=format)
        logits = []
        for place in ("cpu", "disk"):
            with tuckaway.init_empty_weights():
                model = GPT2LMHeadModel(config).eval()
            model = load_and_quantize_model(
                model, options, tmp_path, device_map=place, offload_folder=tmp_path / f"{format}-{place}"
            )
            with torch.no_grad():
                logits.append(model(ids).logits)
            assert model.lm_head.weight is model.transformer.wte.weight
            tuckaway.materialize(model)
            for name in ("c_attn", "c_proj"):  # one is [64, 192], one square
                weight = getattr(source.transformer.h[1].attn, name).weight.detach()
                found = getattr(model.transformer.h[1].attn, name).weight
                assert found.shape == weight.shape
                assert found.layout_info.transposed
                turned = tuckaway.quantize(weight.t().contiguous(), options)
                assert torch.equal(found.codes.reshape(-1), turned.codes.reshape(-1))
                assert torch.equal(found.absmax, turned.absmax)
                assert torch.equal(found.dequantize(), turned.dequantize().t())
        assert torch.equal(*logits)


# The example of a hand-written model


@pytest.fixture(scope="module")
def mingpt() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "mingpt_gpt2.py"
    spec = importlib.util.spec_from_file_location("mingpt_gpt2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mingpt_gpt2"] = module
    spec.loader.exec_module(module)
    return module


def test_the_device_map_of_the_guide(mingpt: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tuckaway.save_model(mingpt.GPT(*mingpt.SIZES["tiny"]), tmp_path, max_shard_size="1MB")
    guide = {
        "transformer.wte": "cpu",
        "transformer.wpe": "cpu",
        "transformer.drop": "cpu",
        "transformer.h": "cpu",
        "transformer.ln_f": "disk",
        "lm_head": "disk",
    }
    ids = tokens(512, length=48)
    for format in FORMATS:
        logits = []
        for device_map in (None, guide, {**guide, "transformer.h": "disk"}):
            with tuckaway.init_empty_weights():
                model = mingpt.GPT(*mingpt.SIZES["tiny"]).eval()
            model = load_and_quantize_model(
                model,
                QuantizationConfig(format, skip_modules=[], compute_dtype="float32"),
                tmp_path,
                device_map,
                ["Block"],
                offload_folder=tmp_path / f"{format}-{len(logits)}",
            )
            assert model.hf_device_map == (device_map or {"": "cpu"})
            assert torch.equal(model.transformer.h[0].attn.bias[0, 0], torch.ones(64, 64).tril())
            with torch.no_grad():
                logits.append(model(ids))
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[0], logits[2])


# bitsandbytes' checkpoints


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "fp4", "fp4-nested", "int8"])
def test_checkpoints_of_bitsandbytes_keep_their_bytes(kind: str, tmp_path: Path) -> None:
    import bitsandbytes as bnb

    name, _, nested = kind.partition("-")
    for blocksize in (64,) if name == "int8" else (64, 256):
        source, state = net(), {}
        for path, tensor in source.state_dict().items():
            module = source.get_submodule(path.rpartition(".")[0])
            if not (isinstance(module, nn.Linear) and path.endswith("weight")) or path == "head.weight":
                state[path] = tensor.clone()
                continue
            layer: Any
            if name == "int8":
                layer = bnb.nn.Linear8bitLt(
                    module.in_features, module.out_features, False, has_fp16_weights=False
                )
                layer.weight = bnb.nn.Int8Params(tensor.clone(), requires_grad=False, has_fp16_weights=False)
            else:
                layer = bnb.nn.Linear4bit(module.in_features, module.out_features, False, quant_type=name)
                layer.weight = bnb.nn.Params4bit(
                    tensor.clone(),
                    requires_grad=False,
                    quant_type=name,
                    compress_statistics=bool(nested),
                    blocksize=blocksize,
                )
            head = path.removesuffix("weight")
            state |= {f"{head}{key}": value.clone() for key, value in layer.to("cpu").state_dict().items()}
        folder = tmp_path / str(blocksize)
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
        logits = []
        # the format asked for is for what is not quantized yet
        for config, place in ((None, "cpu"), (FP32, "cpu"), (FP32, "disk")):
            model = load(folder, config, device_map=place, offload_folder=folder / "store")
            with torch.no_grad():
                logits.append(model(tokens()))
            tuckaway.materialize(model)
            weight = model.layers[1].up.weight
            assert (weight.format, weight.blocksize) == (name, 0 if name == "int8" else blocksize)
            assert weight.layout_info.nested == bool(nested)
            stored = state["layers.1.up.weight"]
            assert torch.equal(weight.codes.reshape(-1), stored.reshape(-1))
            if name == "int8":
                assert torch.equal(weight.absmax, state["layers.1.up.SCB"])
            else:
                prefix = "layers.1.up.weight."
                stats = {k.removeprefix("layers.1.up."): v for k, v in state.items() if k.startswith(prefix)}
                decoded = decoded_by_bitsandbytes({"weight": stored, **stats})
                assert torch.equal(weight.dequantize(torch.float32), decoded)
            assert model.layers[0].w.format == "nf4"
        assert torch.equal(logits[1], logits[2])
        # and they are written as they were read
        tuckaway.save_model(model, folder / "again")
        again = read_all(folder / "again")
        for key in (key for key in state if key.startswith("layers.1.up.")):
            assert torch.equal(again[key], state[key]), key


def test_load_checkpoint_and_dispatch_changes_no_weight(folder: Path, tmp_path: Path) -> None:
    source = net()
    for dtype in (None, torch.bfloat16):
        expected = copy.deepcopy(source) if dtype is None else copy.deepcopy(source).to(dtype)
        expected.freq = source.freq
        for place in ("auto", {"": "disk"}):
            model = tuckaway.load_checkpoint_and_dispatch(
                empty_net(), folder, place, dtype=dtype, offload_folder=tmp_path / str(dtype), strict=True
            )
            with torch.no_grad():
                assert torch.equal(model(tokens()), expected(tokens()))
            assert_same_state(tuckaway.materialize(model), expected)


def test_a_quantized_checkpoint_dispatched_stays_quantized(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    tuckaway.save_model(model, tmp_path)
    again = tuckaway.load_checkpoint_and_dispatch(empty_net(), tmp_path, "cpu")
    assert quantized_names(again) == quantized_names(model)
    assert_same_state(again, model)


def test_left_over_tensors_are_named_in_the_log(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({**read_all(folder), "old.bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING, "tuckaway"):
        load(tmp_path, strict=False)
    assert "old.bias" in caplog.text


def test_progress_is_silent_here(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(folder)
    assert capfd.readouterr() == ("", "")
    load(folder, progress=True)
    assert "Loading" in capfd.readouterr().err


def test_execution_device_must_exist(folder: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    with pytest.raises(PlanError, match="accelerator 0 does not exist"):
        load(folder, device_map={"": 0})


def test_net_has_what_the_tests_are_about() -> None:
    assert {type(m).__name__ for m in Net().modules()} >= {"Embedding", "Linear", "LayerNorm", "Layer"}


class _InterruptedWithoutGradients(nn.Linear):
    """Interrupted in the middle of its load, where gradients are off, as inside the lines of ``torch.no_grad``."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(1)

    def set_extra_state(self, state: torch.Tensor) -> None:
        torch.set_grad_enabled(False)
        raise KeyboardInterrupt


def test_an_interrupt_leaves_gradients_as_they_were(tmp_path):
    model = _InterruptedWithoutGradients(64, 64)
    tuckaway.save_model(model, tmp_path)
    try:
        with pytest.raises(KeyboardInterrupt):
            tuckaway.load_and_quantize_model(model, "nf4", tmp_path)
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
