"""Bad input gets its named error, and leaves the model, the offload folder, files and threads as they were."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tuckaway
from loading import FP32, Net, edit, empty_net, net, read_all, refused, tokens
from tuckaway import load_and_quantize_model
from tuckaway.errors import (
    CheckpointError,
    CheckpointNotFound,
    ConfigError,
    DTypeMismatch,
    HeaderError,
    KeyMismatch,
    MismatchError,
    PagingError,
    PlanError,
    ShapeMismatch,
    ShardIndexError,
    StoreCorrupt,
    StoreError,
    StoreStale,
    TruncatedError,
    UnsafeFormatError,
)

STATE = "layers.1.up.weight.quant_state.bitsandbytes__nf4"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The network in one file."""
    tuckaway.save_model(net(), tmp_path / "net")
    return tmp_path / "net"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """An offload folder that does not exist yet."""
    return tmp_path / "store"


@pytest.fixture(params=["empty", "real", "loaded"])
def model(request: pytest.FixtureRequest) -> Net:
    """What a load that fails must leave alone: an empty model, one with weights, one that is quantized already."""
    if request.param == "empty":
        return empty_net()
    model = net(seed=7)
    return load_and_quantize_model(model, FP32) if request.param == "loaded" else model


def change(folder: Path, edit_state: Any) -> None:
    state = read_all(folder)
    edit_state(state)
    save_file(state, folder / "model.safetensors")


def load(model: nn.Module, location: Any, store: Path, config: Any = FP32, **options: Any) -> None:
    """Load with a part on disk, so that there is something to undo."""
    options = {"device_map": {"": "cpu", "layers": "disk"}, "offload_folder": store, **options}
    load_and_quantize_model(model, config, location, **options)


def test_no_such_file(model: Net, folder: Path, store: Path) -> None:
    with refused(CheckpointNotFound, r"did you mean net\?", model, store) as caught:
        load(model, folder.parent / "nett", store)
    assert str(folder.parent / "nett") in str(caught.value)
    with refused(CheckpointNotFound, "no such file|no checkpoint|no weights", model, store):
        (folder / "model.safetensors").unlink()
        load(model, folder, store)


def test_a_file_of_another_kind(model: Net, folder: Path, store: Path) -> None:
    (folder / "model.txt").write_text("weights")
    with refused(UnsafeFormatError, "no known format", model, store):
        load(model, folder / "model.txt", store)


def test_missing_key_names_the_nearest(model: Net, folder: Path, store: Path) -> None:
    change(folder, lambda s: s.update({"layers.1.upp.weight": s.pop("layers.1.up.weight")}))
    with refused(KeyMismatch, "lacks 1 tensor: 'layers.1.up.weight'", model, store) as caught:
        load(model, folder, store)
    assert "did you mean 'layers.1.upp.weight'" in str(caught.value)
    assert "no place for 1 tensor: 'layers.1.upp.weight'" in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_every_missing_key_is_counted(folder: Path, store: Path) -> None:
    change(folder, lambda s: [s.pop(name) for name in list(s) if name.startswith("layers")])
    with refused(KeyMismatch, "lacks 21 tensors: 'layers.0.w'", empty := empty_net(), store) as caught:
        load(empty, folder, store)
    assert "and 1 more" in str(caught.value)


def test_unexpected_key(model: Net, folder: Path, store: Path) -> None:
    change(folder, lambda s: s.update({"layers.3.up.weight": torch.zeros(2)}))
    with refused(KeyMismatch, "no place for 1 tensor: 'layers.3.up.weight'.*strict=False", model, store):
        load(model, folder, store)


@pytest.mark.parametrize("name", [n for n in net().state_dict() if "layers.2" not in n])
def test_wrong_shape_of_any_tensor(name: str, folder: Path, store: Path) -> None:
    change(folder, lambda s: s.update({name: torch.zeros(3, 5)}))
    with refused(
        ShapeMismatch, r"is \[3, 5\] in the checkpoint and \[", empty := empty_net(), store
    ) as caught:
        load(empty, folder, store)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("name", ["layers.1.up.weight", "norm.weight", "shift"])
def test_integers_for_floats(name: str, dtype: torch.dtype, folder: Path, store: Path) -> None:
    change(folder, lambda s: s.update({name: s[name].to(dtype)}))
    with refused(
        DTypeMismatch, f"is {dtype} in the checkpoint and torch.float32", empty := empty_net(), store
    ):
        load(empty, folder, store)


def test_floats_for_integers(tmp_path: Path, store: Path) -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(64, 64)
            self.register_buffer("count", torch.tensor(3))

    source = Counting()
    save_file({**source.state_dict(), "count": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    with refused(DTypeMismatch, r"'count' is torch.float32 in the checkpoint and torch.int64", source, store):
        load(source, tmp_path, store, device_map=None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("nf5", "unknown format 'nf5'. did you mean 'nf4'"),
        ({"quant_method": "gptq"}, "'gptq' are not known"),
        (7, "int is no quantization config"),
        (FP32.replace(skip_modules=["haed"]), "'haed' in skip_modules matches nothing.*did you mean 'head'"),
        (FP32.replace(keep_in_fp32_modules=["nrom"]), "'nrom' in keep_in_fp32_modules matches nothing"),
    ],
)
def test_configs(model: Net, config: Any, message: str, folder: Path, store: Path) -> None:
    with refused(ConfigError, message, model, store):
        load(model, folder, store, config)


def test_an_empty_model_without_a_checkpoint(store: Path) -> None:
    with refused(ConfigError, r"weights_location is None \(embed.weight\)", empty := empty_net(), store):
        load(empty, None, store)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"layers": "disk", "embed": "cpu", "head": "cpu", "norm": "cpu"}, "leaves out 'shift'"),
        ({"layers.0": "disk", "embed": "cpu", "norm": "cpu", "head": "cpu", "shift": "cpu"}, "and 11 more"),
        ({"": "cpu", "layer": "disk"}, "names 'layer', which is not in the model. did you mean 'layers'"),
        ({"": "cpu", "layers.7": "disk"}, "names 'layers.7', which is not in the model"),
        ({"": "dsik"}, "'dsik' is no device"),
        ({"": -1}, "-1 is no device"),
        ({"": "meta"}, "nothing can be placed on the meta device"),
        ({}, "leaves out 'embed.weight'"),
        ({"": 99}, "accelerator 99 does not exist"),
        ("atuo", "'atuo' is no device map. did you mean 'auto'"),
    ],
)
def test_device_maps(model: Net, device_map: Any, message: str, folder: Path, store: Path) -> None:
    with refused(PlanError, message, model, store):
        load(model, folder, store, device_map=device_map)


@pytest.mark.parametrize("device_map", ["disk", {"": "disk"}, {"": "cpu", "head": "disk"}])
def test_disk_without_a_folder(model: Net, device_map: Any, folder: Path, store: Path) -> None:
    with refused(PlanError, "offload_folder is None", model, store):
        load(model, folder, store, device_map=device_map, offload_folder=None)


def test_what_does_not_fit(model: Net, folder: Path, store: Path) -> None:
    with refused(PlanError, "bytes", model, store) as caught:
        load(model, folder, store, device_map="auto", max_memory={"cpu": 20_000, "disk": 10_000})
    assert "raise max_memory" in str(caught.value)


# The offload folder


def test_the_store_of_another_model(model: Net, folder: Path, store: Path) -> None:
    other = load_and_quantize_model(net(layers=2), FP32, device_map={"": "disk"}, offload_folder=store)
    tuckaway.materialize(other)
    with refused(StoreStale, "another model", model, store):
        load(model, folder, store)


def test_the_store_of_another_format(folder: Path, store: Path) -> None:
    load(model := empty_net(), folder, store)
    tuckaway.materialize(model)
    for config in (FP32.replace(format="int8"), FP32.replace(nested=False), FP32.replace(dtype="bf16")):
        with refused(StoreStale, "another format", empty := empty_net(), store):
            load(empty, folder, store, config)


def test_the_store_of_a_checkpoint_that_changed(folder: Path, store: Path) -> None:
    load(model := empty_net(), folder, store)
    tuckaway.materialize(model)
    change(folder, lambda s: s["layers.1.w"].add_(1))
    with refused(StoreStale, "another model", empty := empty_net(), store):
        load(empty, folder, store)


def test_a_folder_of_accelerate(model: Net, folder: Path, store: Path) -> None:
    store.mkdir()
    (store / "index.json").write_text(json.dumps({"head.weight": {"dtype": "float32", "shape": [1]}}))
    (store / "head.weight.dat").write_bytes(b"1234")
    with refused(StoreStale, "accelerate|another", model, store):
        load(model, folder, store)


def test_a_damaged_store(folder: Path, store: Path) -> None:
    load(model := empty_net(), folder, store)
    tuckaway.materialize(model)
    os.truncate(store / "pages.bin", 4096)
    with refused(StoreCorrupt, "bytes instead of", empty := empty_net(), store):
        load(empty, folder, store)


def test_the_offload_folder_is_a_file(model: Net, folder: Path, store: Path) -> None:
    store.write_bytes(b"mine")
    with refused(StoreError, "store", model):
        load(model, folder, store)
    assert store.read_bytes() == b"mine"


# The checkpoint's files


def sharded(folder: Path) -> Path:
    tuckaway.save_model(net(), folder / "shards", max_shard_size="60kB")
    return folder / "shards"


@pytest.mark.parametrize("left", [0, 7, 100, -1, -5000])
def test_a_truncated_shard(left: int, folder: Path, store: Path) -> None:
    path = sorted(sharded(folder).glob("*.safetensors"))[1]
    os.truncate(path, left if left >= 0 else path.stat().st_size + left)
    with refused(CheckpointError, path.name, empty := empty_net(), store) as caught:
        load(empty, path.parent, store)
    assert isinstance(caught.value, TruncatedError | HeaderError)


def test_a_shard_cut_while_it_is_read(folder: Path, store: Path) -> None:
    """The checkpoint was sound when it was opened: only the reader can tell."""
    from tuckaway.checkpoint import Checkpoint
    from tuckaway.load.job import run

    checkpoint = Checkpoint.open(sharded(folder))
    os.truncate(checkpoint.files[-1], checkpoint.files[-1].stat().st_size - 64)
    with refused(TruncatedError, checkpoint.files[-1].name, empty := empty_net(), store):
        run(
            empty,
            checkpoint,
            FP32,
            device_map={"": "cpu", "layers": "disk"},
            no_split_module_classes=["Layer"],
            max_memory=None,
            offload_folder=store,
            main_device=None,
            offload_buffers=False,
            skip_keys=None,
            strict=True,
            progress=False,
        )


def test_a_missing_shard_and_a_wrong_index(folder: Path, store: Path) -> None:
    shards = sharded(folder)
    index = shards / "model.safetensors.index.json"
    edit(index, lambda c: c["weight_map"].pop("norm.weight"))
    with refused(ShardIndexError, "norm.weight", empty := empty_net(), store):
        load(empty, shards, store)
    sorted(shards.glob("*.safetensors"))[1].unlink()
    with refused(CheckpointError, "model-00002", empty, store):
        load(empty, shards, store)


def test_a_pickle_that_is_refused(model: Net, folder: Path, store: Path) -> None:
    torch.save(read_all(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with refused(UnsafeFormatError, "allow_pickle=False", model, store):
        load(model, folder, store, allow_pickle=False)


class Payload:
    """A pickle that would make a file."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return open, (self.canary, "w")


def test_a_pickle_with_a_payload(model: Net, folder: Path, store: Path) -> None:
    canary = folder.parent / "canary"
    torch.save({**read_all(folder), "head.weight": Payload(str(canary))}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with refused(UnsafeFormatError, "weights_only=True refuses", model, store):
        load(model, folder, store)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (STATE, b"{", "unreadable quantization state"),
        (STATE, b"", "unreadable quantization state"),
        (
            STATE,
            b'{"quant_type": "nf4", "blocksize": 0, "dtype": "float32", "shape": [128, 64]}',
            "blocksize",
        ),
        (STATE, b'{"quant_type": "nf4", "blocksize": 64, "dtype": "nn", "shape": [128, 64]}', "dtype"),
        (
            STATE,
            b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 64]}',
            "does not hold",
        ),
        ("layers.1.up.weight.absmax", None, "'layers.1.up.weight.absmax' is missing"),
        ("layers.1.up.weight.nested_absmax", b"\0" * 8, "does not hold the nested_absmax"),
        ("layers.1.up.weight.quant_map", b"\0" * 16, "a codebook other than"),
    ],
)
def test_a_corrupt_quantization_state(
    key: str, value: bytes | None, message: str, folder: Path, tmp_path: Path, store: Path
) -> None:
    quantized = tmp_path / "quantized"
    tuckaway.save_model(load_and_quantize_model(empty_net(), FP32, folder), quantized)

    def spoil(state: dict[str, torch.Tensor]) -> None:
        del state[key]
        if value is not None:
            state[key] = torch.tensor(list(value), dtype=torch.uint8)

    change(quantized, spoil)
    with refused(CheckpointError, message, empty := empty_net(), store) as caught:
        load(empty, quantized, store)
    assert "layers.1.up.weight" in str(caught.value)


def test_a_quantized_weight_of_another_shape(folder: Path, tmp_path: Path, store: Path) -> None:
    tuckaway.save_model(load_and_quantize_model(empty_net(), FP32, folder), tmp_path / "quantized")
    with refused(ShapeMismatch, r"\[", empty := empty_net(width=32), store):
        load(empty, tmp_path / "quantized", store)


# The model


def test_a_buffer_that_nobody_has_a_value_for(folder: Path, store: Path) -> None:
    with torch.device("meta"):
        empty = Net().eval()
    with refused(MismatchError, r"in no checkpoint and on the meta device \(freq\)", empty, store):
        load(empty, folder, store)


def test_a_paged_model_is_not_loaded_again(folder: Path, tmp_path: Path, store: Path) -> None:
    load(model := empty_net(), folder, store)
    with torch.no_grad():
        expected = model(tokens())
    other = tmp_path / "other"
    for place in ("cpu", {"": "disk"}):
        with refused(PagingError, r"paged already.*materialize", model, store):
            load(model, folder, other, device_map=place)
    assert not other.exists()
    with torch.no_grad():
        assert torch.equal(model(tokens()), expected)


def test_ties_that_the_checkpoint_breaks(folder: Path, store: Path) -> None:
    with refused(
        MismatchError, "are one weight in the model and differ", empty := empty_net(tied=True), store
    ):
        load(empty, folder, store)


def test_a_hundred_failed_loads_leave_nothing_behind(folder: Path, store: Path) -> None:
    change(folder, lambda s: s.update({"shift": torch.zeros(5)}))
    empty = empty_net()
    with refused(ShapeMismatch, "shift", empty, store):
        for _ in range(99):
            with pytest.raises(ShapeMismatch):
                load(empty, folder, store)
        load(empty, folder, store)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_memory_runs_out(tmp_path: Path) -> None:
    """Under a limit of address space that the weights do not fit in; then, without it, the same model loads."""
    script = """
        import gc, resource, sys, threading, torch, tuckaway
        from torch import nn

        with tuckaway.init_empty_weights():
            model = nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(6)])
        before = list(model.parameters())
        # the threads and libraries of a load, which take address space of their own
        tiny = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        tuckaway.load_and_quantize_model(tiny, tuckaway.QuantizationConfig())
        with open("/proc/self/statm") as f:
            now = int(f.read().split()[0]) * resource.getpagesize()
        for spare in (60, 120, 200, 300):
            resource.setrlimit(resource.RLIMIT_AS, (now + spare * 2**20, resource.RLIM_INFINITY))
            try:
                tuckaway.load_checkpoint_and_dispatch(model, sys.argv[1], "cpu")
            except tuckaway.LoadOutOfMemoryError as error:
                assert "memory ran out" in str(error) and "max_memory" in str(error), error
                assert error.__context__ is None
            else:
                raise SystemExit("it fitted")
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            after = list(model.parameters())
            assert all(a is b and a.is_meta for a, b in zip(after, before, strict=True))
            assert not hasattr(model, "hf_device_map")
            assert threading.active_count() == 1
        tuckaway.load_checkpoint_and_dispatch(model, sys.argv[1], "cpu")
        assert not any(p.is_meta for p in model.parameters())
        print("done")
    """
    weights = {f"{i}.weight": torch.zeros(4096, 4096, dtype=torch.bfloat16) for i in range(6)}
    save_file(weights, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]
    shutil.rmtree(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE")
def test_the_disk_refuses_more(folder: Path, store: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    empty = empty_net()
    try:
        with refused(StoreError, "store", empty, store):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            load(empty, folder, store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    load(empty, folder, store)
    with torch.no_grad():
        assert empty(tokens()).isfinite().all()
