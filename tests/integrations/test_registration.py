"""transformers knows tuckaway's configs in whatever order the two are imported, and neither brings in the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

import tuckaway
from hf_models import saved

CHECK = "from transformers.quantizers import auto; assert 'tuckaway' in auto.AUTO_QUANTIZER_MAPPING"
ORDERS = {
    "tuckaway first": f"import tuckaway, sys; assert 'transformers' not in sys.modules; {CHECK}",
    "transformers first": f"import transformers; import tuckaway; {CHECK}",
    "the table first": f"import transformers.quantizers.auto; import tuckaway; {CHECK}",
    "the config only": "from tuckaway import TuckawayConfig; " + CHECK,
    "loaded twice": (
        "import tuckaway, sys, importlib; import transformers.quantizers.auto as auto; importlib.reload(tuckaway); "
        + CHECK
    ),
    "source is still found": (
        "import tuckaway, inspect, transformers.quantizers.auto as auto; "
        "assert 'AUTO_QUANTIZER_MAPPING' in inspect.getsource(auto); "
        "assert type(auto.__loader__).__name__ == 'SourceFileLoader', auto.__loader__; "
        "assert type(auto.__spec__.loader).__name__ == 'SourceFileLoader'"
    ),
    "nothing waits any more": (
        "import tuckaway, sys, transformers.quantizers.auto, transformers.modeling_utils, peft; "
        "assert not any('tuckaway' in type(f).__module__ for f in sys.meta_path)"
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_registered(order: str) -> None:
    done = subprocess.run([sys.executable, "-c", ORDERS[order]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_without_the_import_the_failure_says_what_to_import(format: str, tmp_path: Path) -> None:
    """Codes of int8 have the shape of weights: transformers alone would load them and compute nonsense."""
    config = tuckaway.TuckawayConfig(format)
    model = LlamaForCausalLM.from_pretrained(saved("llama", tmp_path / "p"), quantization_config=config)
    model.save_pretrained(tmp_path / "q")
    script = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(tmp_path / 'q')!r})"
    alone = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert alone.returncode != 0
    assert "run `import tuckaway` before loading it" in alone.stderr.splitlines()[-1]
    imported = f"import tuckaway; {script}"
    done = subprocess.run([sys.executable, "-c", imported], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_bitsandbytes_fields_are_still_bitsandbytes() -> None:
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoQuantizationConfig

    content = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict()
    found = AutoQuantizationConfig.from_dict(content)
    assert type(found) is BitsAndBytesConfig
    assert found.to_dict() == content


def test_without_transformers_nothing_is_missing() -> None:
    script = (
        "import sys; sys.modules['transformers'] = None; import tuckaway; from tuckaway import *\n"
        "try: tuckaway.TuckawayConfig\n"
        "except ImportError as error: assert 'transformers' in str(error)\n"
        "else: raise AssertionError"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
