"""Converting a checkpoint: the tensors of load-and-save, whole or not at all, in any layout of shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import tuckaway
from loading import FORMATS, Net, empty_net, net, read_all, tiny_llama_config
from tuckaway import QuantizationConfig, load_and_quantize_model, quantize_checkpoint, save_model
from tuckaway.errors import CheckpointError, ConfigError, MismatchError, StoreBusy, StoreError
from tuckaway.files import FolderLock


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net")
    save_model(net(), path, max_shard_size=70_000)
    return path


def loaded_and_saved(model: nn.Module, source: Path, config: Any, folder: Path) -> dict[str, torch.Tensor]:
    save_model(load_and_quantize_model(model, config, source), folder)
    return read_all(folder)


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].shape == value.shape, key
        assert torch.equal(found[key].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), key


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shard", ["5GB", 20_000])
def test_the_result_is_that_of_loading_and_saving(source, tmp_path, format, nested, shard):
    config = QuantizationConfig(format=format, nested=nested)
    done = quantize_checkpoint(source, tmp_path / "out", config, model=empty_net(), max_shard_size=shard)
    expected = loaded_and_saved(empty_net(), source, config, tmp_path / "expected")
    assert_same_tensors(read_all(tmp_path / "out"), expected)
    assert len(done.files) == (1 if shard == "5GB" else len(list((tmp_path / "out").glob("*.safetensors"))))
    assert done.nbytes == sum(path.stat().st_size for path in done.files)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (shard != "5GB")


@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig(compute_dtype=None, blocksize=128),
        QuantizationConfig(skip_modules=["layers.1", "up"]),
        QuantizationConfig(quantize_embeddings=True, skip_modules=[]),
        QuantizationConfig(format="int8", keep_in_fp32_modules=["down"], dtype="fp16"),
    ],
)
def test_every_choice_of_the_config_counts(source, tmp_path, config):
    quantize_checkpoint(source, tmp_path / "out", config, model=empty_net())
    expected = loaded_and_saved(empty_net(), source, config, tmp_path / "expected")
    assert_same_tensors(read_all(tmp_path / "out"), expected)


def test_names_and_shapes_decide_as_the_model_does(tmp_path):
    model = net()
    save_model(model, tmp_path / "source")
    done = quantize_checkpoint(tmp_path / "source", tmp_path / "out")
    assert done.basis == "names and shapes"
    expected = loaded_and_saved(empty_net(), tmp_path / "source", None, tmp_path / "expected")
    assert_same_tensors(read_all(tmp_path / "out"), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_of_transformers(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(tiny_llama_config(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    done = quantize_checkpoint(tmp_path / "source", tmp_path / "out", "nf4", max_shard_size="60KB")
    assert done.basis == "LlamaForCausalLM"
    with tuckaway.init_empty_weights():
        empty = transformers.LlamaForCausalLM(tiny_llama_config(tie_word_embeddings=tied))
    expected = loaded_and_saved(empty, tmp_path / "source", "nf4", tmp_path / "expected")
    assert_same_tensors(read_all(tmp_path / "out"), expected)
    ours, theirs = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("out", "expected"))
    assert ours["quantization_config"] == theirs["quantization_config"]
    assert ours["dtype"] == theirs["dtype"]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_transformers_loads_the_result(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(tiny_llama_config()).eval()
    model.save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", QuantizationConfig(compute_dtype="fp32"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    assert type(again.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    tokens = torch.arange(10)[None]
    error = (again(tokens).logits - model(tokens).logits).abs().max()
    assert 0 < error < 0.2 * model(tokens).logits.abs().max()


def test_the_transposed_layers_of_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=64, vocab_size=128, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "source")
    with tuckaway.init_empty_weights():
        empty = transformers.GPT2LMHeadModel(config)
    expected = loaded_and_saved(empty, tmp_path / "source", "nf4", tmp_path / "expected")
    assert quantize_checkpoint(tmp_path / "source", tmp_path / "out").basis == "GPT2LMHeadModel"
    assert_same_tensors(read_all(tmp_path / "out"), expected)
    (tmp_path / "source" / "config.json").unlink()
    assert quantize_checkpoint(tmp_path / "source", tmp_path / "guessed").basis == "names and shapes"
    assert_same_tensors(read_all(tmp_path / "guessed"), expected)


def test_experts_that_lie_apart_in_the_checkpoint(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 4}
    config = transformers.MixtralConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=128, num_experts_per_tok=2
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "source")
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in read_all(tmp_path / "source")
    with tuckaway.init_empty_weights():
        empty = transformers.MixtralForCausalLM(config)
    expected = loaded_and_saved(empty, tmp_path / "source", "nf4", tmp_path / "expected")
    assert quantize_checkpoint(tmp_path / "source", tmp_path / "out").basis == "MixtralForCausalLM"
    assert_same_tensors(read_all(tmp_path / "out"), expected)


def test_a_checkpoint_of_the_model_without_its_head(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=64, vocab_size=128, n_positions=32)
    config.architectures = ["GPT2LMHeadModel"]
    transformers.GPT2Model(config).save_pretrained(tmp_path / "source")
    done = quantize_checkpoint(tmp_path / "source", tmp_path / "out")
    assert done.basis.startswith("GPT2")
    assert len(done.report.quantized) == 8


def test_a_pickle(tmp_path):
    model = net()
    (tmp_path / "source").mkdir()
    torch.save(model.state_dict(), tmp_path / "source" / "pytorch_model.bin")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", model=empty_net())
    expected = loaded_and_saved(empty_net(), tmp_path / "source", None, tmp_path / "expected")
    assert_same_tensors(read_all(tmp_path / "out"), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_quantized_already_goes_through_as_it_is(source, tmp_path, format):
    first = quantize_checkpoint(source, tmp_path / "first", format)
    again = quantize_checkpoint(tmp_path / "first", tmp_path / "again", "int8" if format == "nf4" else "nf4")
    assert [row.name for row in again.report.quantized] == [row.name for row in first.report.quantized]
    assert_same_tensors(read_all(tmp_path / "again"), read_all(tmp_path / "first"))


def test_two_copies_of_a_tied_weight(tmp_path):
    state = dict(net(tied=True).state_dict())
    state["head.weight"] = state["head.weight"].clone()
    (tmp_path / "source").mkdir()
    save_file(state, tmp_path / "source" / "model.safetensors")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", model=empty_net(tied=True))
    assert "head.weight" not in read_all(tmp_path / "out")
    state["head.weight"][0, 0] += 1
    save_file(state, tmp_path / "source" / "model.safetensors")
    with pytest.raises(MismatchError, match=r"'embed.weight' and 'head.weight' are one weight"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "other", model=empty_net(tied=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_tensors_without_a_place_are_carried_along(source, tmp_path, caplog):
    (tmp_path / "source").mkdir()
    extra = torch.arange(12, dtype=torch.int16).view(3, 4)
    save_file({**net().state_dict(), "mtp.weight": extra}, tmp_path / "source" / "model.safetensors")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", model=empty_net())
    assert torch.equal(read_all(tmp_path / "out")["mtp.weight"], extra)
    assert "mtp.weight" in caplog.text


def test_empty_and_scalar_tensors(tmp_path):
    tensors = {
        "a.weight": torch.ones(0, 64),
        "b": torch.tensor(3.0),
        "c": torch.tensor([], dtype=torch.int64),
    }
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", QuantizationConfig(compute_dtype=None))
    assert_same_tensors(read_all(tmp_path / "out"), tensors)


def test_the_file_is_one_that_safetensors_reads_lazily(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_a_finished_destination_is_left_alone(source, tmp_path):
    first = quantize_checkpoint(source, tmp_path / "out", max_shard_size=20_000)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = quantize_checkpoint(source, tmp_path / "out", max_shard_size=20_000)
    assert again.kept_shards == len(again.files) == len(first.files)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


@pytest.mark.parametrize("where", ["source", "source/below", "."])
def test_destination_and_source_lie_apart(tmp_path, where):
    save_model(net(), tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match="lies in the"):
        quantize_checkpoint(tmp_path / "source", tmp_path / where)
    assert sorted(tmp_path.rglob("*")) == before


def test_refusals_leave_nothing_behind(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for target, config, error, words in [
        ("full", "nf4", StoreError, "the destination is not empty"),
        ("file", "nf4", StoreError, "this is a file"),
        ("new", "nf5", ConfigError, "unknown format 'nf5'"),
        ("new", QuantizationConfig(skip_modules=["nowhere"]), ConfigError, "'nowhere' in skip_modules"),
    ]:
        with pytest.raises(error, match=words):
            quantize_checkpoint(source, tmp_path / target, config)
    with pytest.raises(ValueError, match="is no size"):
        quantize_checkpoint(source, tmp_path / "new", max_shard_size="lots")
    with pytest.raises(MismatchError):
        quantize_checkpoint(source, tmp_path / "new", model=Net(layers=4))
    assert sorted(tmp_path.rglob("*")) == before


def test_one_conversion_a_destination(source, tmp_path):
    with FolderLock(tmp_path / ".out.lock"), pytest.raises(StoreBusy, match="another process converts"):
        quantize_checkpoint(source, tmp_path / "out")


def test_a_source_that_changes_meanwhile_is_refused(source, tmp_path, monkeypatch):
    from tuckaway.convert import convert

    save_model(net(), tmp_path / "source")
    decide = convert.decide

    def change_then_decide(*arguments: Any, **options: Any) -> Any:
        found = decide(*arguments, **options)
        save_model(net(seed=1), tmp_path / "source")
        return found

    monkeypatch.setattr(convert, "decide", change_then_decide)
    with pytest.raises(CheckpointError, match="was changed after"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
