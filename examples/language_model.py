"""A language model of transformers: quantized by name, paged from disk, saved, and loaded again.

    python examples/language_model.py [FOLDER_OR_HUB_ID]

Without an argument, a Llama with random weights is made on the spot. Generation goes through transformers' own
``generate``; where the layers lie changes no token.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tuckaway


def small_llama(folder: Path) -> str:
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).save_pretrained(folder)
    return str(folder)


def generate(model: torch.nn.Module) -> list[int]:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    prompt = torch.arange(1, 9, device=device)[None]
    mask = torch.ones_like(prompt)
    with torch.no_grad():
        tokens = model.generate(
            prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
        )
    return tokens[0, 8:].tolist()


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        name = sys.argv[1] if len(sys.argv) > 1 else small_llama(Path(work, "original"))
        config = tuckaway.QuantizationConfig("nf4", compute_dtype=torch.float32)

        resident = tuckaway.from_pretrained(name, quantization_config=config, device_map="auto")
        print(f"resident: {tuckaway.memory_footprint(resident):,} bytes, {resident.hf_device_map}")

        paged = tuckaway.from_pretrained(
            name, quantization_config=config, device_map={"": "disk"}, offload_folder=f"{work}/pages"
        )
        print(f"paged: {paged.quantization_report.bytes_by_device()}")
        print("the same tokens:", generate(paged) == generate(resident))

        tuckaway.save_model(resident, f"{work}/quantized")
        again = tuckaway.from_pretrained(f"{work}/quantized", device_map="auto")
        print("and from the saved folder:", generate(again) == generate(resident))


if __name__ == "__main__":
    main()
