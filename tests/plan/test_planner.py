"""The public planner: what it says is what is there after loading, and what does not fit is said in bytes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig

import tuckaway
from loading import empty_net, net, tiny_llama_config
from tuckaway.errors import CheckpointNotFound, ConfigError, PlanError
from tuckaway.plan.machine import Speeds

FREE = {"reserve_bytes": 0}


@pytest.fixture(autouse=True)
def _never_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("TUCKAWAY_CACHE", str(tmp_path / "no-speeds"))


@pytest.fixture
def stack():
    with tuckaway.init_empty_weights():
        return nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(16)])


def test_a_plan_is_data(stack, tmp_path):
    plan = tuckaway.plan(
        stack, "nf4", max_memory={"cpu": "8MB"}, speeds=Speeds("cpu", disk=1e9, host=1e10), **FREE
    )
    assert plan.paged_bytes
    assert not plan.resident
    assert sum(block.nbytes for block in plan.blocks) == plan.weights_bytes
    assert sum(memory.weights_bytes for memory in plan.devices) == plan.weights_bytes
    plan.save(tmp_path / "plan.json")
    assert tuckaway.Plan.load(tmp_path / "plan.json") == plan
    assert tuckaway.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(AttributeError):
        plan.slots = 3


def test_no_plan(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(PlanError, match="cannot read a plan"):
        tuckaway.Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="this is no plan"):
        tuckaway.Plan.from_dict({"version": 1})
    with pytest.raises(PlanError, match="version 99"):
        tuckaway.Plan.from_dict({"version": 99})


def test_every_limit_is_kept_and_nothing_is_allocated(stack):
    for limits in ({0: "20MB", "cpu": "4MB"}, {0: "30MB", "cpu": "1GB"}, {0: "80MB"}, {"cpu": "6MB"}):
        plan = tuckaway.plan(stack, "int8", max_memory=limits, reserve_bytes="1MB") if limits else None
        for memory in plan.devices:
            if memory.limit_bytes is not None:
                assert memory.counted_bytes <= memory.limit_bytes
    assert all(p.is_meta for p in stack.parameters())


def test_the_table_and_the_picture(stack, tmp_path):
    plan = tuckaway.plan(stack, "nf4", max_memory={0: "25MB", "cpu": "1GB"}, **FREE)
    text = str(plan)
    assert all(word in text for word in ("GPU 0", "RAM, paged", "slots", "nf4"))
    assert "expected" not in text  # nothing was measured
    svg = plan.picture(tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").read_text() == svg == plan._repr_html_()
    assert svg.startswith("<svg")
    assert svg.count("<title>") >= len(plan.blocks)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format", ["nf4", "int8", "bf16"])
def test_what_is_planned_is_what_is_loaded(format, tied, tmp_path):
    tuckaway.save_model(net(tied=tied, layers=6), tmp_path / "checkpoint")
    plan = tuckaway.plan(
        empty_net(tied=tied, layers=6),
        format,
        {"": "cpu", "layers.2": "disk", "layers.4": "disk"},
        no_split_module_classes=["Layer"],
        **FREE,
    )
    model = tuckaway.load_and_quantize_model(
        empty_net(tied=tied, layers=6),
        weights_location=tmp_path / "checkpoint",
        device_map=plan,
        offload_folder=tmp_path / "pages",
    )
    assert model.hf_device_map == plan.device_map
    found = tuckaway.memory_footprint(model, by_device=True)
    assert found["cpu"] == plan.on("cpu").weights_bytes
    assert found["disk"] == plan.on("disk").weights_bytes
    paging = model._tuckaway_paging
    assert paging.plan.store_nbytes == plan.on("disk").in_use_bytes
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    assert paging.pager.nbytes == plan.on("cpu").slots_bytes
    formats = {"nf4": "nf4", "int8": "int8"}
    assert getattr(model.layers[0].up.weight, "format", None) == formats.get(format)


def test_slots_of_a_plan_are_used(tmp_path):
    tuckaway.save_model(net(layers=6), tmp_path / "checkpoint")
    plan = tuckaway.plan(empty_net(layers=6), "nf4", {"": "disk"}, slots=4, **FREE)
    model = tuckaway.load_and_quantize_model(
        empty_net(layers=6),
        weights_location=tmp_path / "checkpoint",
        device_map=plan,
        offload_folder=tmp_path / "p",
    )
    assert model._tuckaway_paging.pager.slots.count == 4


def test_ram_that_pages_on_disk_stay_in_is_counted_and_used(tmp_path):
    tuckaway.save_model(net(layers=6), tmp_path / "checkpoint")
    places = {"": "cpu", "layers": "disk"}
    options = {"no_split_module_classes": ["Layer"], **FREE}
    plain = tuckaway.plan(empty_net(layers=6), "nf4", places, **options)
    plan = tuckaway.plan(empty_net(layers=6), "nf4", places, disk_cache_bytes="60kB", **options)
    kept = plan.on("cpu").cache_bytes
    assert 0 < kept <= 60_000
    assert plan.on("cpu").counted_bytes == plain.on("cpu").counted_bytes + kept
    model = tuckaway.load_and_quantize_model(
        empty_net(layers=6),
        weights_location=tmp_path / "checkpoint",
        device_map=plan,
        offload_folder=tmp_path / "pages",
    )
    assert model._tuckaway_paging.homes.cache.nbytes == kept


def test_a_plan_for_another_model_is_refused(tmp_path):
    tuckaway.save_model(net(), tmp_path / "checkpoint")
    plan = tuckaway.plan(empty_net(layers=3), "nf4", {"": "cpu"}, **FREE)
    with pytest.raises(PlanError, match=r"the plan puts \d+ bytes on RAM, and the model has \d+"):
        tuckaway.load_and_quantize_model(empty_net(), "int8", tmp_path / "checkpoint", device_map=plan)


def test_a_folder_with_weights_or_without(tmp_path):
    from transformers import LlamaForCausalLM

    config = tiny_llama_config(dtype="bfloat16")
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "whole")
    config.save_pretrained(tmp_path / "config")
    whole, bare = tuckaway.plan(tmp_path / "whole", **FREE), tuckaway.plan(tmp_path / "config", **FREE)
    assert whole.blocks == bare.blocks == tuckaway.plan(config, **FREE).blocks
    assert bare.checkpoint_bytes is None
    assert whole.checkpoint_bytes == sum(
        p.nbytes for p in LlamaForCausalLM.from_pretrained(tmp_path / "whole").parameters()
    )
    (tmp_path / "whole" / "config.json").unlink()
    guessed = tuckaway.plan(tmp_path / "whole", **FREE)
    rotary = sum(block.plain_bytes for block in whole.blocks if block.name == "model.rotary_emb")
    assert guessed.weights_bytes == whole.weights_bytes - rotary


def test_a_folder_that_is_quantized_already(tmp_path):
    source = tuckaway.load_and_quantize_model(
        net(), tuckaway.QuantizationConfig(format="nf4", blocksize=128, nested=False)
    )
    tuckaway.save_model(source, tmp_path)
    assert tuckaway.plan(tmp_path, "nf4", **FREE).bytes_by_format()["nf4"] > 0
    model = tuckaway.load_and_quantize_model(empty_net(), weights_location=tmp_path)
    plan = tuckaway.plan(tmp_path, **FREE)
    quantized = sum(r.nbytes for r in model.quantization_report.rows if r.format == "nf4")
    assert plan.bytes_by_format()["nf4"] == quantized


def test_a_configuration_of_other_kinds():
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 500}
    gpt2 = tuckaway.plan(GPT2Config(**sizes), "int8", **FREE)
    assert gpt2.tied == (("transformer.wte.weight", "lm_head.weight"),)
    as_dict = tuckaway.plan({"model_type": "gpt2", **sizes}, "int8", **FREE)
    assert as_dict.blocks == gpt2.blocks
    with pytest.raises(ConfigError, match="knows no model of type 'none such'"):
        tuckaway.plan({"model_type": "none such"})


@pytest.mark.parametrize(
    ("given", "error"),
    [("no/such/place/at/all", CheckpointNotFound), ("./none", CheckpointNotFound), (7, ConfigError)],
)
def test_what_names_no_model(given, error):
    with pytest.raises(error):
        tuckaway.plan(given)


def test_what_does_not_fit_says_by_how_much_and_what_would(stack):
    with pytest.raises(PlanError, match=r"nf4 would fit") as caught:
        tuckaway.plan(stack, "bf16", max_memory={"cpu": "12MB", "disk": 0}, **FREE)
    assert caught.value.shortfall_bytes > 0
    short = caught.value.shortfall_bytes
    plan = tuckaway.plan(stack, "bf16", max_memory={"cpu": 12_000_000 + short, "disk": 0}, **FREE)
    assert plan.resident
    with pytest.raises(PlanError, match="more in max_memory\\['disk'\\] would fit"):
        tuckaway.plan(stack, "nf4", max_memory={"cpu": "5MB", "disk": 0}, **FREE)
    with pytest.raises(PlanError, match="a length of 512 tokens would fit"):
        tuckaway.plan(stack, "nf4", max_memory={"cpu": "40MB"})
    with pytest.raises(PlanError, match=r"GPU 0, \d+ bytes more than") as caught:
        tuckaway.plan(stack, "nf4", {"": 0}, max_memory={0: "1MB"}, **FREE)
    assert caught.value.shortfall_bytes > 8_000_000


def test_fit_takes_the_most_precise_format_that_stays_and_else_the_fastest(stack):
    def fitted(size):
        return tuckaway.plan(stack, max_memory={"cpu": size}, fit=True, **FREE)

    assert set(fitted("40MB").bytes_by_format()) == {"bfloat16"}
    assert "int8" in fitted("25MB").bytes_by_format()
    assert "nf4" in fitted("14MB").bytes_by_format()
    small = fitted("6MB")
    assert "nf4" in small.bytes_by_format()
    assert not small.resident
    with pytest.raises(PlanError, match="in the smallest format"):
        tuckaway.plan(stack, max_memory={"cpu": "100kB", "disk": 0}, fit=True, **FREE)


def test_times_follow_from_speeds(stack):
    speeds = Speeds("gpu", bus=50e9, disk=1e9, page_cache=10e9, host=90e9, memory=3e12)
    plan = tuckaway.plan(stack, "int8", {"": "cpu"}, speeds=speeds, **FREE)
    assert plan.expected.step_seconds == pytest.approx(plan.weights_bytes / 90e9)
    disk = tuckaway.plan(stack, "int8", {"": "disk"}, speeds=speeds, **FREE)
    assert disk.expected.step_seconds == pytest.approx(disk.paged_bytes / 1e9)
    assert disk.expected.warm_step_seconds == pytest.approx(disk.paged_bytes / 10e9)
    assert "tokens/s" in str(disk)
    paged = tuckaway.plan(stack, "int8", {"": "cpu", "0": 0}, speeds=speeds, **FREE)
    assert paged.expected.tokens_per_second(4) == pytest.approx(4 * 50e9 / paged.paged_bytes)


def test_more_length_needs_more_reserve():
    config = LlamaConfig(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2)
    short, long = (tuckaway.plan(config, "nf4", {"": 0}, sequence_length=n) for n in (128, 4096))
    difference = long.on(0).reserve_bytes - short.on(0).reserve_bytes
    assert difference > (4096 - 128) * 2 * 4 * 2 * 64 * 2  # keys and values: layers, heads, width, bf16


def test_a_plan_of_an_unquantized_model_is_loaded_by_accelerates_function_too(tmp_path):
    tuckaway.save_model(net(), tmp_path / "checkpoint")
    plan = tuckaway.plan(empty_net(), "bf16", {"": "cpu", "layers": "disk"}, **FREE)
    model = tuckaway.load_checkpoint_and_dispatch(
        empty_net(), tmp_path / "checkpoint", plan, offload_folder=tmp_path / "pages"
    )
    assert model.head.weight.dtype == torch.bfloat16
    assert tuckaway.plan(empty_net(), "bf16", plan, **FREE).blocks == plan.blocks


def test_a_gpu_executes_though_no_block_stays_on_it(stack):
    with pytest.raises(PlanError, match="GPU 0 must hold") as caught:
        tuckaway.plan(stack, "bf16", max_memory={0: "1MB", "cpu": "1GB"}, **FREE)
    least = 10**6 + caught.value.shortfall_bytes
    plan = tuckaway.plan(stack, "bf16", max_memory={0: least, "cpu": "1GB"}, **FREE)
    assert set(plan.device_map.values()) == {"cpu"}
    assert plan.execution_device == 0
    assert plan.on(0).slots_bytes >= 2 * plan.slot_bytes > 0
    assert plan.on("cpu").slots_bytes == 0


def test_planning_for_gpus_that_are_elsewhere_is_silent(stack, caplog):
    tuckaway.plan(stack, "nf4", max_memory={6: "1GB", "cpu": "1GB"}, **FREE)
    assert caplog.records == []
