"""The package's face: its names, and what importing it does not do."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import accelerate
import accelerate.utils

import tuckaway
from tuckaway import errors


def test_public_names_exist_and_are_sorted() -> None:
    assert all(hasattr(tuckaway, name) for name in tuckaway.__all__)
    own = [name for name in tuckaway.__all__ if name not in errors.__all__]
    assert own == sorted(own)
    assert len(set(tuckaway.__all__)) == len(tuckaway.__all__)


def test_the_names_people_type() -> None:
    assert {
        "QuantizationConfig",
        "QuantizedTensor",
        "cpu_offload",
        "disk_offload",
        "dispatch_model",
        "from_pretrained",
        "get_balanced_memory",
        "infer_auto_device_map",
        "init_empty_weights",
        "init_on_device",
        "load_and_quantize_model",
        "load_checkpoint_and_dispatch",
        "materialize",
        "memory_footprint",
        "plan",
        "quantize",
        "quantize_checkpoint",
        "save_model",
        "TuckawayError",
        "KeyMismatch",
    } <= set(tuckaway.__all__)


def test_accelerates_names_are_all_there() -> None:
    theirs = {
        "cpu_offload",
        "disk_offload",
        "dispatch_model",
        "get_balanced_memory",
        "infer_auto_device_map",
        "init_empty_weights",
        "init_on_device",
        "load_and_quantize_model",
        "load_checkpoint_and_dispatch",
        "load_checkpoint_in_model",
    }
    assert all(hasattr(accelerate, name) or hasattr(accelerate.utils, name) for name in theirs)
    assert theirs | {"save_model"} <= set(tuckaway.__all__)


def test_every_error_is_public() -> None:
    assert {name for name in errors.__all__ if name != "nearest_names"} <= set(tuckaway.__all__)
    assert "nearest_names" not in tuckaway.__all__


def test_every_public_name_says_what_it_is() -> None:
    assert [name for name in tuckaway.__all__ if not (getattr(tuckaway, name).__doc__ or "").strip()] == []


def test_import_brings_no_optional_library_and_touches_no_accelerator() -> None:
    script = """
        import json, sys
        import torch

        touched = []
        for name in ("_lazy_init", "init"):
            setattr(torch.cuda, name, lambda *a, **k: touched.append("cuda"))
        before = len(sys.modules)
        import tuckaway

        names = {
            "bitsandbytes", "datasets", "diffusers", "gguf", "pandas", "peft", "rich", "tokenizers", "transformers",
            "triton", "trl", "typer",
        }
        print(json.dumps([
            sorted(names & set(sys.modules)),
            touched,
            torch.cuda.is_initialized(),
            len(sys.modules) - before,
        ]))
    """
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:tuckaway", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
    )
    optional, touched, initialized, modules = json.loads(done.stdout.splitlines()[-1])
    assert (optional, touched, initialized) == ([], [], False)
    assert modules < 500  # 241 modules in 0.25 to 0.5 s over torch's own; transformers alone is some 1,500
