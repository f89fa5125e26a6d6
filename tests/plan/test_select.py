from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tuckaway.config import QuantizationConfig
from tuckaway.empty import init_empty_weights
from tuckaway.errors import ConfigError, PlanError
from tuckaway.plan import choose_specs, output_head
from tuckaway.tensor import quantize

ALL = QuantizationConfig(skip_modules=[])


def empty(make):
    with init_empty_weights():
        return make()


def quantized(model: nn.Module, config: QuantizationConfig = ALL) -> set[str]:
    specs, reasons = choose_specs(model, config)
    assert set(specs) == {
        n for named in (model.named_parameters, model.named_buffers) for n, _ in named(remove_duplicate=False)
    }
    assert set(reasons) == {name for name, spec in specs.items() if spec.layout is None}
    assert all(reasons.values())
    return set(specs) - set(reasons)


class Written(nn.Module):
    """A module that holds its parameters itself."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: nn.Linear(128, 64), {"weight"}),
        (lambda: nn.Bilinear(64, 64, 8), {"weight"}),
        (lambda: nn.MultiheadAttention(64, 4), {"in_proj_weight", "out_proj.weight"}),
        (
            lambda: nn.MultiheadAttention(64, 4, kdim=32, vdim=32, add_bias_kv=True),
            {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"},
        ),
        (lambda: nn.Conv2d(32, 64, 3), {"weight"}),
        (lambda: nn.Conv1d(32, 64, 3, groups=2), {"weight"}),
        (lambda: nn.Conv1d(32, 32, 3, groups=32), set()),
        (lambda: nn.ConvTranspose2d(32, 64, 3), set()),
        (lambda: nn.Embedding(100, 64), set()),
        (lambda: nn.EmbeddingBag(100, 64), set()),
        (lambda: nn.LSTM(64, 64), set()),
        (lambda: nn.GRUCell(64, 64), set()),
        (lambda: nn.LayerNorm((64, 64)), set()),
        (lambda: nn.Linear(64, 1), set()),
        (lambda: nn.Linear(7, 9), set()),  # one block of weights, not full
        (lambda: nn.Linear(64, 64, dtype=torch.float16), {"weight"}),
        (lambda: Written(w=(64, 64), experts=(4, 64, 128)), {"w", "experts"}),
        (lambda: Written(A_log=(64, 64), w=(64, 16), cls_token=(64, 64), pos_embed=(64, 64)), set()),
        (lambda: Written(down_proj_bias=(8, 64), scale=(64, 1), bias=(64,), x=(1, 64, 64)), set()),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
            {"parametrizations.weight.original1"},
        ),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(32, 64, 3)),
            {"parametrizations.weight.original1"},
        ),
    ],
)
def test_chosen_by_use(make, expected):
    assert quantized(empty(make)) == expected


def test_int8_only_where_it_saves():
    int8 = ALL.replace(format="int8")
    assert quantized(nn.Conv2d(32, 64, 3), int8) == set()  # a scale for every three weights
    assert quantized(nn.Linear(128, 64), int8) == {"weight"}


def test_embeddings_on_request():
    config = ALL.replace(quantize_embeddings=True)
    assert quantized(nn.Embedding(100, 64), config) == {"weight"}
    assert quantized(nn.Embedding(100, 64, max_norm=1.0), config) == set()


def test_marked_parameters_are_left_alone():
    model = Written(w=(64, 64))
    model.w._no_weight_decay = True
    assert quantized(model) == set()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_other_dtypes_are_left_alone(dtype):
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(64, 64, dtype=dtype), requires_grad=False)
    specs, _ = choose_specs(model, ALL)
    assert specs["w"].layout is None
    assert specs["w"].dtype == dtype


def test_transposed_storage_of_conv1d():
    model = empty(lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=200)))
    specs, _ = choose_specs(model, QuantizationConfig())
    spec = specs["transformer.h.0.attn.c_attn.weight"]
    assert spec.shape == (64, 192)
    assert spec.layout.shape == (192, 64)
    assert spec.layout.transposed
    assert spec.layout.logical_shape == spec.shape


def test_the_layout_is_that_of_quantizing():
    config = QuantizationConfig(format="int8", compute_dtype=torch.float16, skip_modules=[])
    model = nn.Linear(64, 32)
    spec = choose_specs(model, config)[0]["weight"]
    made = quantize(model.weight.half(), config)
    assert spec.layout == made.layout_info
    assert spec.dtype == spec.layout.dtype == torch.float16
    assert not spec.requires_grad
    assert {k: (tuple(t.shape), t.dtype) for k, t in made.components.items()} == spec.components()


# Dtypes of the rest


def test_dtypes_of_what_is_not_quantized():
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8))
    model.register_buffer("inv_freq", torch.ones(4), persistent=False)
    model.register_buffer("ids", torch.arange(4))
    specs, reasons = choose_specs(model, QuantizationConfig(dtype=torch.float16))
    assert (
        specs["0.weight"].dtype == specs["1.weight"].dtype == specs["0.running_mean"].dtype == torch.float16
    )
    assert specs["inv_freq"].dtype == torch.float32
    assert specs["ids"].dtype == specs["0.num_batches_tracked"].dtype == torch.int64
    assert specs["0.weight"].requires_grad
    assert specs["inv_freq"].is_buffer
    assert not specs["inv_freq"].persistent
    assert specs["ids"].persistent
    assert reasons["ids"] == "a buffer"


def test_no_config_changes_nothing():
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)).half()
    specs, reasons = choose_specs(model, None)
    assert all(spec.layout is None for spec in specs.values())
    assert {s.dtype for s in specs.values()} == {torch.float16, torch.int64}
    assert reasons["0.weight"] == "no format was asked for"
    specs, _ = choose_specs(model, None, dtype="bfloat16")
    assert {s.dtype for s in specs.values()} == {torch.bfloat16, torch.int64}


def test_config_without_dtypes_keeps_each_tensors_own():
    config = QuantizationConfig(compute_dtype=None, skip_modules=[])
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).half())
    specs, _ = choose_specs(model, config)
    assert [specs[n].dtype for n in ("0.weight", "1.weight", "0.bias", "1.bias")] == [
        torch.float32,
        torch.float16,
        torch.float32,
        torch.float16,
    ]


def test_what_is_quantized_already_stays():
    model = nn.Linear(64, 64, bias=False)
    model.weight = nn.Parameter(quantize(model.weight, "int8"), requires_grad=False)
    specs, reasons = choose_specs(model, ALL)
    assert specs["weight"].layout.format == "int8"
    assert reasons == {}


def test_kept_in_fp32():
    model = nn.ModuleDict({"norm": nn.LayerNorm(64), "wo": nn.Linear(64, 64), "wi": nn.Linear(64, 64)})
    specs, reasons = choose_specs(model, ALL.replace(keep_in_fp32_modules=["wo", "norm"]))
    assert specs["norm.weight"].dtype == specs["wo.weight"].dtype == specs["wo.bias"].dtype == torch.float32
    assert reasons["wo.weight"] == "kept in fp32"
    assert specs["wi.weight"].layout is not None
    assert specs["wi.bias"].dtype == torch.bfloat16


def test_kept_in_fp32_under_every_name():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    specs, reasons = choose_specs(model, ALL.replace(keep_in_fp32_modules=["b"]))
    assert specs["a.weight"] == specs["b.weight"]
    assert specs["a.weight"].dtype == torch.float32
    assert "tied to b.weight" in reasons["a.weight"]


# What is skipped


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), "1"),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()), None),
        (lambda: nn.Linear(8, 8), None),  # no children
        (lambda: nn.Sequential(nn.Linear(8, 8)), None),  # nothing before it
        (lambda: nn.ModuleDict({"head": nn.Linear(8, 8), "layers": nn.ModuleList([nn.Linear(8, 8)])}), None),
        (lambda: nn.ModuleDict({"gate": nn.Linear(8, 8), "experts": Written(w=(4, 64, 64))}), None),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)), "1"),
        (
            lambda: LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=99)),
            "lm_head",
        ),
        (lambda: BertModel(BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2)), None),
    ],
)
def test_output_head(make, head):
    assert output_head(empty(make)) == head


def test_the_head_is_skipped_with_what_is_tied_to_it():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "head": nn.Linear(64, 64)})
    model["head"].weight = model["a"].weight
    assert quantized(model, QuantizationConfig()) == {"b.weight"}
    _, reasons = choose_specs(model, QuantizationConfig())
    assert reasons["head.weight"] == "the output head"
    assert reasons["a.weight"] == "tied to head.weight (the output head)"
    assert quantized(model) == {"a.weight", "b.weight", "head.weight"}


def test_a_head_whose_method_is_not_implemented():
    class Base(nn.Sequential):
        def get_output_embeddings(self):
            raise NotImplementedError

    assert output_head(Base(nn.Linear(8, 8), nn.Linear(8, 2))) == "1"


def test_tied_to_an_embedding():
    model = empty(lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=200)))
    specs, reasons = choose_specs(model, ALL)
    assert specs["lm_head.weight"] == specs["transformer.wte.weight"]
    assert "embedding" in reasons["lm_head.weight"]
    specs, _ = choose_specs(model, ALL.replace(quantize_embeddings=True))
    assert specs["lm_head.weight"] == specs["transformer.wte.weight"]
    assert specs["lm_head.weight"].layout is not None


def test_tied_across_storage_orders():
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(64, 64))

    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": Conv1D()})
    model["b"].weight = model["a"].weight
    assert quantized(model) == set()


def layered() -> nn.Module:
    def layer() -> nn.Module:
        return nn.ModuleDict({"mlp": nn.ModuleDict({"c_proj": nn.Linear(64, 64)}), "attn": nn.Linear(64, 64)})

    return nn.ModuleDict({"h": nn.ModuleList([layer() for _ in range(11)]), "c_proj2": nn.Linear(64, 64)})


@pytest.mark.parametrize(
    ("pattern", "skipped"),
    [
        ("mlp.c_proj", {f"h.{i}.mlp.c_proj.weight" for i in range(11)}),
        ("c_proj", {f"h.{i}.mlp.c_proj.weight" for i in range(11)}),
        ("h.1", {"h.1.mlp.c_proj.weight", "h.1.attn.weight"}),  # not h.10
        ("h.1.attn.weight", {"h.1.attn.weight"}),
        ("h.*.attn", {f"h.{i}.attn.weight" for i in range(11)}),
        ("h.?", {f"h.{i}.{m}.weight" for i in range(10) for m in ("attn", "mlp.c_proj")}),
        ("c_proj2", {"c_proj2.weight"}),
        ("h", {f"h.{i}.{m}.weight" for i in range(11) for m in ("attn", "mlp.c_proj")}),
    ],
)
def test_patterns(pattern, skipped):
    model = layered()
    every = quantized(model)
    assert every - quantized(model, ALL.replace(skip_modules=[pattern])) == skipped


@pytest.mark.parametrize("parameter", ["skip_modules", "keep_in_fp32_modules"])
def test_a_pattern_that_matches_nothing(parameter, caplog):
    config = ALL.replace(**{parameter: ["mlp.c_porj"]})
    with pytest.raises(ConfigError, match=rf"'mlp.c_porj' in {parameter} .*did you mean 'mlp.c_proj'"):
        choose_specs(layered(), config)
    specs, _ = choose_specs(layered(), config, strict=False)
    assert specs["h.0.attn.weight"].layout is not None
    assert "mlp.c_porj" in caplog.text


@pytest.mark.parametrize("pattern", ["proj", "mlp.*.weight.x", "1.attn.wei", ""])
def test_patterns_match_whole_names_only(pattern):
    with pytest.raises(ConfigError):
        choose_specs(layered(), ALL.replace(skip_modules=[pattern]))


@pytest.mark.parametrize("written", ["re:h[.]1?[0-3][.]attn", re.compile(r"h\.1?[0-3]\.attn")])
def test_regular_expressions_match_whole_paths(written):
    every = quantized(layered())
    left = every - quantized(layered(), ALL.replace(skip_modules=[written]))
    assert left == {f"h.{i}.attn.weight" for i in (0, 1, 2, 3, 10)}
    with pytest.raises(ConfigError, match="matches nothing"):
        choose_specs(layered(), ALL.replace(skip_modules=["re:attn"]))


def test_only_some_modules():
    config = QuantizationConfig(only_modules=["h.*.attn", "h.3"])
    expected = {f"h.{i}.attn.weight" for i in range(11)} | {"h.3.mlp.c_proj.weight"}
    assert quantized(layered(), config) == expected
    _, reasons = choose_specs(layered(), config)
    assert reasons["h.0.mlp.c_proj.weight"] == "not in only_modules"
    assert quantized(layered(), config.replace(skip_modules=["h.3.mlp"])) == {
        f"h.{i}.attn.weight" for i in range(11)
    }


def formats_of(model: nn.Module, **options) -> dict[str, str | None]:
    specs, _ = choose_specs(model, QuantizationConfig(**options))
    return {
        name: spec.layout and spec.layout.format for name, spec in specs.items() if name.endswith("weight")
    }


def test_formats_by_module():
    found = formats_of(
        layered(), format="fp4", formats={"h.1.mlp": None, "h.*.mlp": "nf4", "h.*": "int8", "h.2.mlp": "fp4"}
    )
    assert found["h.0.attn.weight"] == "int8"
    assert found["h.0.mlp.c_proj.weight"] == "nf4"
    assert found["h.1.mlp.c_proj.weight"] is None  # names count before wildcards, wherever they stand
    assert found["h.2.mlp.c_proj.weight"] == "fp4"
    assert found["c_proj2.weight"] is None  # the output head
    _, reasons = choose_specs(layered(), QuantizationConfig(formats={"h.1.mlp": None}))
    assert reasons["h.1.mlp.c_proj.weight"] == "formats: 'h.1.mlp' is None"


def test_what_is_named_overrides_the_defaults_and_what_is_globbed_does_not():
    def make():
        return nn.ModuleDict(
            {
                "wte": nn.Embedding(99, 64),
                "h": nn.Linear(64, 64),
                "w": Written(scale=(64, 64)),
                "head": nn.Linear(64, 99),
            }
        )

    assert formats_of(make(), formats={"*": "int8"}) == {
        "wte.weight": None,
        "h.weight": "int8",
        "head.weight": None,
    }
    named = formats_of(make(), formats={"wte": "int8", "head": "nf4"})
    assert named == {"wte.weight": "int8", "h.weight": "nf4", "head.weight": "nf4"}
    assert quantized(make(), QuantizationConfig(only_modules=["head", "scale"])) == {"head.weight", "w.scale"}


def test_a_tied_tensor_has_one_format():
    model = empty(lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=200)))
    specs, reasons = choose_specs(
        model, QuantizationConfig(formats={"lm_head": "int8", "transformer.*": "nf4"})
    )
    assert specs["lm_head.weight"] == specs["transformer.wte.weight"]
    assert specs["lm_head.weight"].layout.format == "int8"
    specs, reasons = choose_specs(model, QuantizationConfig(quantize_head=True))
    assert "embedding" in reasons["lm_head.weight"]
    specs, reasons = choose_specs(model, QuantizationConfig(quantize_head=True, quantize_embeddings=True))
    assert specs["transformer.wte.weight"].layout.format == "nf4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only_modules": ["attm"]}, "'attm' in only_modules .*did you mean 'attn'"),
        ({"formats": {"h.*.mpl": "nf4"}}, r"'h.\*.mpl' in formats matches nothing"),
        ({"formats": {"c_proj2.bias": "nf4"}}, "names nothing that can be quantized .*one-dimensional"),
        ({"only_modules": ["h.1"], "skip_modules": ["h.1"]}, "names nothing that can be quantized .*skipped"),
    ],
)
def test_what_would_do_nothing_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        choose_specs(layered(), QuantizationConfig(**options))


def test_small_parameters_stay():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 128)})
    config = ALL.replace(min_weights=4097)
    assert quantized(model, config) == {"b.weight"}
    assert "min_weights" in choose_specs(model, config)[1]["a.weight"]
    assert quantized(model, config.replace(formats={"a": "nf4"})) == {"a.weight", "b.weight"}


def test_lazy_modules_are_refused():
    with pytest.raises(PlanError, match="lazy"):
        choose_specs(nn.Sequential(nn.LazyLinear(3)), ALL)


def test_the_model_and_config_are_not_changed():
    model, config = layered(), QuantizationConfig(skip_modules=["h.1"])
    before = {name: id(p) for name, p in model.named_parameters()}
    choose_specs(model, config)
    assert before == {name: id(p) for name, p in model.named_parameters()}
    assert config == QuantizationConfig(skip_modules=["h.1"])
