"""``torch.export`` of quantized models: the program computes what the model does, also once it was saved and loaded."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import tuckaway
from heavy import ALL, count
from zoo.entry import Entry
from zoo.harness import CONFIGS, one_thread, outputs, with_weights
from zoo.language_models import LANGUAGE
from zoo.perception_models import PERCEPTION

ENTRIES = {entry.name: entry for entry in (*LANGUAGE, *PERCEPTION)}
BRANCHES = "with plain weights too: it asks for a tensor's values to choose what it computes"
NOT_EXPORTED = {
    "Encodec": BRANCHES,
    "LED": BRANCHES,
    "Longformer": BRANCHES,
    "Qwen2VL": BRANCHES,
    "Vilt": BRANCHES,
    "Nystromformer": "with plain weights too: it reshapes its mask to what does not fit",
    "SwitchTransformers": "with plain weights too: it converts its router inside its forward",
    "PaliGemma": "exported with plain weights it computes something else",
}
MASKED = {"LongT5", "SwitchTransformers"}
"""They make the mask that they need only where nothing traces them."""
ROUNDED = {"Beit", "ConvBert", "Qwen3Next"}
"""torch's tracing takes operations apart: sums come in another order, in two of them with plain weights too."""

REPRESENTATIVE = ["Llama", "GPT2", "Mixtral", "Bert", "T5", "ViT", "Whisper", "CLIP"]
OTHERS = [name for name in ENTRIES if name not in (*REPRESENTATIVE, *NOT_EXPORTED)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", CONFIGS)
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_exported_models(name: str, format: str) -> None:
    check_exported(ENTRIES[name], format, through_a_file=True)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS[:: count(40, 1 if ALL else 2)])
def test_every_other_model_exported(name: str) -> None:
    # reading and writing a program takes as long as making it, and has little to do with the model
    check_exported(ENTRIES[name], "nf4", through_a_file=len(name) % 4 == 0)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(NOT_EXPORTED)[:: count(len(NOT_EXPORTED), 1)])
def test_what_is_not_exported_is_so_with_plain_weights(name: str) -> None:
    """Or else it is the quantized weights that must be mended."""
    with one_thread():
        model = without_cache(with_weights(ENTRIES[name].build))
        arguments = arguments_of(ENTRIES[name], model)
        expected = outputs(model, arguments)
        try:
            found = outputs(export(model, arguments).module(), arguments)
        except (RuntimeError, torch._dynamo.exc.UserError):
            return
    assert not torch.allclose(found[0], expected[0], atol=1e-3)


def check_exported(entry: Entry, format: str, *, through_a_file: bool) -> None:
    with one_thread():
        model = tuckaway.load_and_quantize_model(
            with_weights(entry.build), CONFIGS[format], device_map={"": "cpu"}
        )
        without_cache(model)
        arguments = arguments_of(entry, model)
        expected = outputs(model, arguments)
        program = export(model, arguments)
        check_equal(entry, outputs(program.module(), arguments), expected)
        if through_a_file:
            file = io.BytesIO()
            torch.export.save(program, file)
            file.seek(0)
            check_equal(entry, outputs(torch.export.load(file).module(), arguments), expected)


def check_equal(entry: Entry, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        if entry.name in ROUNDED:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def export(model: nn.Module, arguments: dict[str, Any]) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (), arguments, strict=False)


def arguments_of(entry: Entry, model: nn.Module) -> dict[str, Any]:
    arguments = entry.arguments(model)
    if entry.name in MASKED:
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
    return arguments


def without_cache(model: nn.Module) -> nn.Module:
    """A program can only return what torch knows how to take apart; caches it does not."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False
    return model
