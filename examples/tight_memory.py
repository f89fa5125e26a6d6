"""Too little memory: a device map by hand keeps the embeddings ready, the layers in RAM, the head on disk.

    python examples/tight_memory.py

The map is the one of accelerate's guide to quantization. Every part is quantized wherever it lies, and is brought to
the executing device for its turn; the output is the same, bit for bit, as with everything resident.
"""

from __future__ import annotations

import tempfile

import torch
from mingpt_gpt2 import GPT, SIZES

import tuckaway

DEVICE_MAP: dict[str, int | str] = {
    "transformer.wte": 0,
    "transformer.wpe": 0,
    "transformer.drop": 0,
    "transformer.h": "cpu",
    "transformer.ln_f": "disk",
    "lm_head": "disk",
}


def load(folder: str, device_map: dict[str, int | str] | None, offload_folder: str | None) -> GPT:
    with tuckaway.init_empty_weights():
        model = GPT(*SIZES["tiny"]).eval()
    config = tuckaway.QuantizationConfig(format="nf4", compute_dtype=torch.float32, skip_modules=[])
    return tuckaway.load_and_quantize_model(
        model,
        config,
        weights_location=folder,
        device_map=device_map,
        no_split_module_classes=["Block"],
        offload_folder=offload_folder,
    )


def main() -> None:
    torch.manual_seed(0)
    device_map = DEVICE_MAP
    if not torch.accelerator.is_available():  # the CPU executes, and stands for device 0
        device_map = {name: "cpu" if place == 0 else place for name, place in DEVICE_MAP.items()}

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as offload_folder:
        tuckaway.save_model(GPT(*SIZES["tiny"]), folder)
        resident = load(folder, None, None)
        spread = load(folder, device_map, offload_folder)
        for name, place in spread.hf_device_map.items():
            print(f"{name:18} {place}")

        tokens = torch.randint(0, 512, (2, 48), device=next(resident.parameters()).device)
        with torch.no_grad():
            same = torch.equal(resident(tokens), spread(tokens))
        print("logits are bit-identical to those of the resident model:", same)


if __name__ == "__main__":
    main()
