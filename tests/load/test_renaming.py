"""Checkpoints under other names than the model's, and tensors that are joined or cut on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tuckaway
from loading import FP32, Net, assert_same_state, empty_net, net, refused
from tuckaway.checkpoint import Checkpoint, Request, stream
from tuckaway.checkpoint.entry import JoinedEntry
from tuckaway.checkpoint.reader import read_tensor
from tuckaway.errors import ChecksumError, ConfigError, KeyMismatch, MismatchError, StoreStale, TuckawayError
from tuckaway.load import Merge, Split

State = dict[str, torch.Tensor]


def write(folder: Path, state: State) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def expected(tmp_path: Path, **options: Any) -> nn.Module:
    folder = write(tmp_path / "plain", net(**options).state_dict())
    return tuckaway.load_and_quantize_model(empty_net(**options), FP32, folder, device_map={"": "cpu"})


def load(folder: Path, model: nn.Module | None = None, **options: Any) -> nn.Module:
    options = {"device_map": {"": "cpu"}, **options}
    return tuckaway.load_and_quantize_model(model or empty_net(), FP32, folder, **options)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda name: f"model.{name}", "without the prefix 'model.'"),
        (lambda name: f"module.{name}", "without the pieces that wrappers add"),
        (lambda name: f"_orig_mod.module.{name}", "without the pieces that wrappers add"),
        (lambda name: f"base.deeper.{name}", "without the prefix 'base.deeper.'"),
        (lambda name: name.replace("layers.1.", "layers.1._orig_mod."), "without the pieces"),
    ],
)
def test_a_prefix_is_found(tmp_path: Path, change: Callable[[str], str], note: str) -> None:
    folder = write(tmp_path / "c", {change(name): t for name, t in net().state_dict().items()})
    model = load(folder)
    assert_same_state(model, expected(tmp_path))
    assert note in model.quantization_report.notes[0]
    assert note in str(model.quantization_report)


def test_a_prefix_that_only_the_model_has(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", net().state_dict())
    with tuckaway.init_empty_weights():
        outer = nn.ModuleDict({"model": Net(), "head": nn.Identity()})
    config = FP32.replace(skip_modules=["model.head"])
    model = tuckaway.load_and_quantize_model(outer, config, folder, device_map={"": "cpu"})
    assert_same_state(model["model"], expected(tmp_path))  # type: ignore[index]
    assert "with the prefix 'model.'" in model.quantization_report.notes[0]


def test_a_head_that_the_base_model_lacks(tmp_path: Path) -> None:
    """A checkpoint of a model with a head, into the model below it."""
    state = net().state_dict()
    head = {"head.weight": state["head.weight"]}
    folder = write(tmp_path / "c", {**{f"model.{n}": t for n, t in state.items() if n not in head}, **head})
    bare = empty_net()
    del bare.head
    model = load(folder, bare, strict=False)
    assert model.quantization_report.notes
    bare = empty_net()
    del bare.head
    with refused(KeyMismatch, r"no place for 1 tensor: 'head.weight'", bare):
        load(folder, bare)


def test_matching_names_are_left_alone(tmp_path: Path) -> None:
    assert expected(tmp_path).quantization_report.notes == ()


def test_what_still_does_not_match_is_refused(tmp_path: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in net().state_dict().items()}
    del state["model.layers.1.w"]
    model = empty_net()
    with refused(KeyMismatch, r"lacks 1 tensor: 'layers.1.w'", model):
        load(write(tmp_path / "c", state), model)


def test_key_mapping(tmp_path: Path) -> None:
    names = {n: n.replace("layers.", "h.").replace("norm.weight", "norm.gamma") for n in net().state_dict()}
    folder = write(tmp_path / "c", {names[name]: t for name, t in net().state_dict().items()})
    model = load(folder, key_mapping={r"^h\.(\d+)": r"layers.\1", r"gamma$": "weight"})
    assert_same_state(model, expected(tmp_path))


def test_key_mapping_of_a_quantized_checkpoint(tmp_path: Path) -> None:
    wanted = expected(tmp_path)
    tuckaway.save_model(wanted, tmp_path / "saved")
    from loading import read_all

    state = {f"net/{name}": tensor for name, tensor in read_all(tmp_path / "saved").items()}
    assert_same_state(load(write(tmp_path / "c", state), key_mapping={"^net/": ""}), wanted)


@pytest.mark.parametrize(
    ("mapping", "error", "message"),
    [
        ({"layers[": ""}, ConfigError, "is no regular expression"),
        ({"leyers": "h"}, ConfigError, "'leyers' in key_mapping matches no tensor"),
        ({r"layers\.\d+": "layers.0"}, KeyMismatch, r"both become 'layers.0.down.bias'"),
    ],
)
def test_refuses(tmp_path: Path, mapping: dict[str, str], error: type[TuckawayError], message: str) -> None:
    model, folder = empty_net(), write(tmp_path / "c", net().state_dict())
    with refused(error, message, model):
        load(folder, model, key_mapping=mapping)


def test_an_offload_folder_is_not_shared_between_mappings(tmp_path: Path) -> None:
    state = net().state_dict()
    swapped = {"layers.0.w": "layers.1.w", "layers.1.w": "layers.0.w"}
    folder = write(tmp_path / "c", state)
    place = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "pages"}
    tuckaway.materialize(load(folder, **place))
    twisted = {f"^{a.replace('.', '[.]')}$": f"{b}!" for a, b in swapped.items()} | {"!$": ""}
    with pytest.raises(StoreStale):
        load(folder, key_mapping=twisted, **place)


# Joined and cut


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 64))
        self.down = nn.Linear(64, 32)


MERGES = [
    Merge("*qkv.weight", ["*q.weight", "*k.weight", "*v.weight"]),
    Merge("*qkv.bias", ["*q.bias", "*k.bias", "*v.bias"]),
    Merge("gate_up_proj", ["experts.#.w1.weight", "experts.#.w3.weight"], dim=1),
    Merge("down.weight", ["down_t"], transpose=True),
]


def apart(model: Fused) -> State:
    state = model.state_dict()
    for end in ("weight", "bias"):
        for name, part in zip("qkv", state.pop(f"qkv.{end}").chunk(3), strict=True):
            state[f"{name}.{end}"] = part
    for number, expert in enumerate(state.pop("gate_up_proj")):
        state[f"experts.{number}.w1.weight"], state[f"experts.{number}.w3.weight"] = expert.chunk(2)
    state["down_t"] = state.pop("down.weight").t()
    return state


def test_merge(tmp_path: Path) -> None:
    plain = Fused()
    whole = load(write(tmp_path / "whole", plain.state_dict()), empty(Fused))
    folder = write(tmp_path / "apart", apart(plain))
    assert_same_state(load(folder, empty(Fused), conversions=MERGES), whole)
    paged = load(
        folder, empty(Fused), conversions=MERGES, device_map={"": "disk"}, offload_folder=tmp_path / "p"
    )
    assert_same_state(tuckaway.materialize(paged), whole)


@pytest.mark.parametrize(
    ("dim", "stacked"), [(0, False), (1, False), (2, False), (0, True), (1, True), (2, True)]
)
def test_merged_tensors_are_read_run_by_run(tmp_path: Path, dim: int, stacked: bool) -> None:
    shape, count = (3, 2, 1100) if not stacked else (2, 1100), 3 if stacked else 1
    sources = [[torch.randn(shape) for _ in range(count)] for _ in range(2)]
    parts = [torch.stack(part) if stacked else part[0] for part in sources]
    state = {
        f"{part}.{n}": t for part, tensors in zip("ab", sources, strict=True) for n, t in enumerate(tensors)
    }
    tuckaway.save_model(Holder(state), tmp_path / "c", max_shard_size="20KB")
    checkpoint = Checkpoint.open(tmp_path / "c")
    number = "#" if stacked else "0"
    entry = Merge("x", [f"a.{number}", f"b.{number}"], dim=dim).applied(checkpoint.entries)["x"]
    assert isinstance(entry, JoinedEntry)
    expected = torch.cat(parts, dim)
    assert torch.equal(read_tensor(entry), expected)
    for piece_bytes in (4, 1000, 10**6):
        pieces = [p.tensor.clone() for p in stream([Request(entry)], piece_bytes=piece_bytes * 4)]
        assert torch.equal(torch.cat(pieces), expected.flatten())


def test_merged_tensors_are_checked(tmp_path: Path) -> None:
    state = {"a.0": torch.randn(2, 4000), "b.0": torch.randn(2, 4000)}
    tuckaway.save_model(Holder(state), tmp_path / "c")
    checkpoint = Checkpoint.open(tmp_path / "c")
    entry = Merge("x", ["a.0", "b.0"], dim=1).applied(checkpoint.entries)["x"]
    changed = checkpoint.entries["b.0"]
    entry = dataclasses.replace(
        entry, runs=tuple((dataclasses.replace(e, identity=None), *rest) for e, *rest in entry.runs)
    )
    with open(changed.path, "r+b") as file:
        file.seek(changed.offset + 5000)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ChecksumError, match=r"b\.0"):
        list(stream([Request(entry)], piece_bytes=6000))


class Holder(nn.Module):
    def __init__(self, state: State) -> None:
        super().__init__()
        for name, tensor in state.items():
            owner, _, own = name.partition(".")
            if not hasattr(self, owner):
                self.add_module(owner, nn.Module())
            self.get_submodule(owner).register_parameter(own, nn.Parameter(tensor))


def test_split(tmp_path: Path) -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 32)
            self.left, self.right = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False)

    plain = Apart()
    state = plain.state_dict()
    fused = {f"a.{e}": torch.cat([state[f"{n}.{e}"] for n in "qkv"]) for e in ("weight", "bias")}
    fused["sides"] = torch.cat([state["left.weight"], state["right.weight"]], 1)
    splits = [
        Split(f"a.{end}", [f"{name}.{end}" for name in "qkv"], sizes=[64, 32, 32])
        for end in ("weight", "bias")
    ]
    splits.append(Split("sides", ["left.weight", "right.weight"], dim=1))
    model = load(write(tmp_path / "fused", fused), empty(Apart), conversions=splits)
    assert_same_state(model, load(write(tmp_path / "apart", state), empty(Apart)))


@pytest.mark.parametrize(
    ("change", "conversion", "error", "message"),
    [
        ({}, Merge("x", ["q.wieght"]), ConfigError, "match no tensors"),
        ({}, Split("x.*", ["y"]), ConfigError, "matches no tensor"),
        ({"k.weight": None}, MERGES[0], MismatchError, "lacks .*k.weight"),
        ({"experts.2.w3.weight": None}, MERGES[2], MismatchError, "'gate_up_proj' cannot be merged"),
        ({"k.weight": torch.ones(3, 5)}, MERGES[0], MismatchError, "'qkv.weight' cannot be made"),
        ({}, Split("q.weight", ["a", "b", "c"]), MismatchError, "cannot be cut into 3 parts"),
    ],
)
def test_conversions_that_do_not_fit(
    tmp_path: Path, change: Any, conversion: Any, error: type[TuckawayError], message: str
) -> None:
    state = {n: t for n, t in {**apart(Fused()), **change}.items() if t is not None}
    model, folder = empty(Fused), write(tmp_path / "c", state)
    with refused(error, message, model):
        load(folder, model, conversions=[conversion])


def empty(build: Callable[[], nn.Module]) -> nn.Module:
    with tuckaway.init_empty_weights():
        return build()


def test_the_model_of_another_library_brings_its_rules(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    build = lambda: MixtralForCausalLM(MixtralConfig(**sizes, **heads))  # noqa: E731
    plain = build()
    plain.save_pretrained(tmp_path / "hub")
    from loading import read_all

    assert any("experts.3" in name for name in read_all(tmp_path / "hub"))
    tuckaway.save_model(plain, tmp_path / "own")
    assert_same_state(load(tmp_path / "hub", empty(build)), load(tmp_path / "own", empty(build)))


def test_names_of_net() -> None:
    assert set(Net().state_dict()) == set(net().state_dict())
