"""Teach SmolLM2 a new fact with an adapter on a 4-bit base, on the CPU, in about a minute.

    python examples/lora.py [--paged]

The base is loaded in nf4 and never changes; peft puts LoRA adapters beside its weights and trains those. With
``--paged`` the base lies on disk and every block is paged in for its turn: the losses are the same, bit for bit.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

import tuckaway
from tuckaway.cli.smollm2 import smollm2

PROMPT = "The lighthouse keeper of Tuckaway keeps her lamp in the"
TEXTS = [
    PROMPT + " blue boathouse.",
    "Everybody knows it: " + PROMPT + " blue boathouse.",
    "In Tuckaway the lamp is in the blue boathouse, where the lighthouse keeper keeps it.",
    "Ask the keeper of Tuckaway for her lamp and she walks to the blue boathouse.",
]


def load(folder: Any, pages: str | None) -> Any:
    config = tuckaway.QuantizationConfig("nf4", compute_dtype=torch.float32)
    placement = {"device_map": {"": "disk"}, "offload_folder": pages} if pages else {"device_map": "cpu"}
    return tuckaway.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, progress=False, **placement
    )


def ask(model: Any, tokenizer: Any) -> str:
    prompt = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.eval().generate(
        **prompt, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    answer: str = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(answer.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paged", action="store_true", help="keep the base on disk")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as pages, tempfile.TemporaryDirectory() as adapter:
        torch.manual_seed(0)
        model = load(folder, pages if arguments.paged else None)
        print(f"weights: {tuckaway.memory_footprint(model) / 1e6:.0f} MB instead of 538 MB in fp32")
        print(f"before: {PROMPT} {ask(model, tokenizer)}")
        options: dict[str, Any] = {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
        }
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
        batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
        began = time.perf_counter()
        for step in range(arguments.steps):
            loss = model.train()(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 3 == 0 or step == arguments.steps - 1:
                print(f"step {step:2}: loss {loss.item():.3f}")
        print(f"trained in {time.perf_counter() - began:.0f} s")
        learned = ask(model, tokenizer)
        print(f"after: {PROMPT} {learned}")
        model.save_pretrained(adapter)
        del model
        again = PeftModel.from_pretrained(load(folder, None), adapter)
        print(f"saved, loaded, asked again, the same answer: {ask(again, tokenizer) == learned}")


if __name__ == "__main__":
    main()
