"""Models of transformers, one test an architecture and format."""

from __future__ import annotations

from pathlib import Path

import pytest

import tuckaway
from zoo.entry import Entry
from zoo.harness import CONFIGS, check_model, one_thread
from zoo.language_models import LANGUAGE
from zoo.perception_models import PERCEPTION

ENTRIES = [*LANGUAGE, *PERCEPTION]
ALL_TOO_SMALL = {"Encodec"}  # convolutions with rows of seven weights, and an LSTM

SAVE = {
    # the layout of the Hub: experts apart, old names, what is computed left out
    "nf4": lambda model, folder: model.save_pretrained(folder),
    "int8": tuckaway.save_model,
}


def test_the_zoo_is_big() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(names) == len(set(names)) > 130
    kinds = {entry.kind for entry in ENTRIES}
    expected = {
        "decoder",
        "encoder",
        "encoder-decoder",
        "MoE",
        "state space",
        "vision",
        "speech",
        "multimodal",
    }
    assert kinds >= expected


@pytest.mark.filterwarnings("ignore")  # those of the models' own code, which is not ours to mend
@pytest.mark.parametrize("format", CONFIGS)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_model(entry: Entry, format: str, tmp_path: Path) -> None:
    with one_thread():
        report = check_model(entry.build, entry.arguments, SAVE[format], format, tmp_path)
    assert report.quantized or entry.name in ALL_TOO_SMALL


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma", "Bert", "T5", "Bart", "Whisper", "Mamba", "CLIP"])
@pytest.mark.parametrize("format", CONFIGS)
def test_embeddings_and_heads_too(name: str, format: str, tmp_path: Path) -> None:
    entry = next(entry for entry in ENTRIES if entry.name == name)
    with one_thread():
        report = check_model(
            entry.build,
            entry.arguments,
            SAVE[format],
            format,
            tmp_path,
            quantize_embeddings=True,
            quantize_head=True,
        )
    reasons = {row.reason for row in report.unquantized if len(row.shape) > 1}
    assert not any("embedding" in str(reason) or "head" in str(reason) for reason in reasons)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Llama", "Mixtral", "ViT", "T5"])
def test_a_format_for_each_part(name: str, tmp_path: Path) -> None:
    entry = next(entry for entry in ENTRIES if entry.name == name)
    left_out = {} if name == "ViT" else {"re:.*[.](0|1)[.].*[.](o|o_proj)": None}
    formats = {
        **left_out,
        "re:.*(self_attn|attention|SelfAttention).*": "int8",
    }  # the first that matches counts
    with one_thread():
        report = check_model(
            entry.build,
            entry.arguments,
            tuckaway.save_model,
            "nf4",
            tmp_path,
            formats=formats,
            int8_threshold=None,
        )
    assert {row.format for row in report.quantized} == {"nf4", "int8"}
    left = [row for row in report.unquantized if "formats:" in (row.reason or "") and len(row.shape) > 1]
    assert bool(left) == (name != "ViT")
