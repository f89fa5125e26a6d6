"""diffusers' pipelines, lm-evaluation-harness and the Hub's mixin, with models that tuckaway quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

import tuckaway
from hf_models import saved
from tuckaway import QuantizationConfig, QuantizedTensor

EXACT = QuantizationConfig("nf4", compute_dtype=None)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.filterwarnings("ignore")  # diffusers' own, of libraries that are not there
def test_diffusers_pipeline(place: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    config: dict[str, Any] = dict(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
    )
    diffusers.DiTTransformer2DModel(**config).save_pretrained(tmp_path / "dit")
    with tuckaway.init_empty_weights():
        model = diffusers.DiTTransformer2DModel(**config)
    options = {"device_map": {"": place}, "offload_folder": tmp_path / "pages"}
    model = tuckaway.load_and_quantize_model(model.eval(), EXACT, tmp_path / "dit", **options)
    quantized = [name for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)]
    assert any("transformer_blocks.1.attn1.to_q" in name for name in quantized)
    pipe = diffusers.DiTPipeline(
        transformer=model,
        vae=diffusers.AutoencoderKL(
            block_out_channels=[8], norm_num_groups=4, latent_channels=4, sample_size=8
        ),
        scheduler=diffusers.DDIMScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe([1], num_inference_steps=2, generator=generator, output_type="np").images
    assert images.shape == (1, 8, 8, 3)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.filterwarnings("ignore")  # of the harness's own dependencies
def test_lm_evaluation_harness(place: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = tuckaway.from_pretrained(
        saved("llama", tmp_path / "plain"),
        quantization_config=EXACT,
        device_map={"": place},
        offload_folder=tmp_path / "pages",
    )
    harness = HFLM(pretrained=model, tokenizer=words(), batch_size=2, max_length=32)
    pairs = [("w1 w2 w3", " w4 w5"), ("w9", " w8 w7 w6")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    scores = harness.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (score, _) in zip(pairs, scores, strict=True):
        ids = [int(word[1:]) for word in (context + continuation).split()]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(context.split())
        expected = sum(float(logits[at - 1, ids[at]]) for at in range(start, len(ids)))
        assert score == pytest.approx(expected, rel=1e-4)


def words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    level = Tokenizer(models.WordLevel({f"w{n}": n for n in range(128)}, unk_token="w0"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=level, pad_token="w127", eos_token="w126")


class Net(nn.Module, PyTorchModelHubMixin):
    """A class as the Hub's documentation has it."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_hub_mixin(place: str, tmp_path: Path) -> None:
    plain = Net(width=128)
    plain.save_pretrained(tmp_path / "net")
    with tuckaway.init_empty_weights():
        model: Any = Net(width=128)
    options: dict[str, Any] = {"device_map": {"": place}, "offload_folder": tmp_path / "pages"}
    model = tuckaway.load_and_quantize_model(
        model,
        QuantizationConfig("int8", int8_threshold=None, compute_dtype=None),
        tmp_path / "net",
        **options,
    )
    assert model.layers[0].weight.format == "int8"
    x = torch.randn(3, 128)
    torch.testing.assert_close(model(x), plain(x), rtol=0.1, atol=0.05)
    # quantized in place: what from_pretrained of the mixin gave
    loaded = tuckaway.load_and_quantize_model(Net.from_pretrained(tmp_path / "net"), EXACT)
    assert isinstance(loaded.layers[2].weight, QuantizedTensor)
