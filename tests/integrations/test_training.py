"""Adapters trained by transformers' ``Trainer`` and TRL's ``SFTTrainer`` on quantized bases, resident and paged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import tuckaway
from hf_models import saved
from tuckaway import PagingError, QuantizationConfig
from tuckaway.paging import paging_of

# peft and TRL ask the newest transformers by names of the one before; torch's loader says that nothing can be pinned
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:DeprecationWarning"),
]
STEPS = 6


class Counting(Dataset[dict[str, list[int]]]):
    """Sentences that count: easily learned."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = [(index + step) % 100 for step in range(16)]
        return {"input_ids": row, "labels": row}


def base(folder: Path, place: str, format: str = "nf4") -> Any:
    folder.mkdir(exist_ok=True)
    return tuckaway.from_pretrained(
        saved("llama", folder / "plain"),
        quantization_config=QuantizationConfig(format, compute_dtype=None),
        device_map={"": "disk" if place == "paged" else "cpu"},
        offload_folder=folder / "pages",
    )


def adapted(model: Any) -> Any:
    torch.manual_seed(3)
    return get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"])
    )


def trainer(model: Any, folder: Path, steps: int = STEPS, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    return Trainer(model=model, args=arguments, train_dataset=Counting(), eval_dataset=Counting())


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_paged_trains_as_resident_does(checkpointing: bool, tmp_path: Path) -> None:
    results = []
    for place in ("resident", "paged"):
        model = adapted(base(tmp_path / place, place))
        run = trainer(model, tmp_path / place, gradient_checkpointing=checkpointing)
        run.train()
        assert (paging_of(model.get_base_model()) is not None) == (place == "paged")
        results.append((losses(run), weights(model), run.evaluate()["eval_loss"]))
    (first, adapters, scored), (second, paged_adapters, paged_scored) = results
    assert first == second
    assert first[-1] < first[0]
    assert scored == paged_scored
    for name, value in adapters.items():
        assert torch.equal(value, paged_adapters[name]), name


@pytest.mark.parametrize("place", ["resident", "paged"])
def test_checkpointing_changes_no_gradient(place: str, tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(base(tmp_path / str(checkpointing), place))
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        rows = torch.tensor([Counting()[i]["input_ids"] for i in range(2)])
        model(input_ids=rows, labels=rows).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize("place", ["resident", "paged"])
def test_resumed_ends_where_uninterrupted_does(place: str, tmp_path: Path) -> None:
    whole = adapted(base(tmp_path / "whole", place))
    trainer(whole, tmp_path / "whole").train()
    half = adapted(base(tmp_path / "half", place))
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    trainer(half, tmp_path / "half", steps=STEPS // 2, **saving).train()
    resumed = adapted(base(tmp_path / "rest", place))
    trainer(resumed, tmp_path / "half", **saving).train(resume_from_checkpoint=True)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_training_the_base_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantized"):
        trainer(base(tmp_path, "resident"), tmp_path)
    model = base(tmp_path / "paged", "paged")
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(PagingError, match="gradient"):
        model(torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()


@pytest.mark.filterwarnings("ignore")  # datasets pickles pyarrow's types to name its caches
@pytest.mark.parametrize("place", ["resident", "paged"])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_sft_trainer(place: str, format: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed; it comes with tuckaway[train]")
    import pyarrow
    from datasets import Dataset as Rows
    from trl import SFTConfig, SFTTrainer

    model = base(tmp_path, place, format)
    # with a name of its own: datasets 5.2 cannot pickle some releases of pyarrow to make one
    table = pyarrow.table({"input_ids": [Counting()[i]["input_ids"] for i in range(32)]})
    rows = Rows(table, fingerprint="counting")
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    run = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=words(),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"]),
    )
    run.train()
    seen = losses(run)
    assert seen[-1] < seen[0]
    assert (paging_of(run.model.get_base_model()) is not None) == (place == "paged")


def words() -> Any:
    """A tokenizer whose tokens are called w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    level = Tokenizer(models.WordLevel({f"w{n}": n for n in range(128)}, unk_token="w0"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=level, pad_token="w127", eos_token="w126")
