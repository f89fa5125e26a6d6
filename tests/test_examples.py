"""Every example runs, as a reader would run it, and shows what it says it shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHOWN = {
    "any_module.py": ["nf4: ", "relative error of the output: 0."],
    "gpt2_conv1d.py": ["Conv1D.weight [128, 384]: int8", "largest difference of a logit: 0.0"],
    "language_model.py": ["paged: {'disk': ", "the same tokens: True", "and from the saved folder: True"],
    "lora.py": [
        "after: The lighthouse keeper of Tuckaway keeps her lamp in the blue boathouse",
        "answer: True",
    ],
    "mingpt_gpt2.py": ["MB in fp32", "tokens: [1, 2, 3, "],
    "tight_memory.py": ["lm_head            disk", "bit-identical to those of the resident model: True"],
}


def run(name: str, *arguments: str) -> str:
    """Run an example in a process of its own, in which any warning is an error, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_example_is_forgotten() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SHOWN)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "lora.py")) for name in SHOWN]
)
def test_example_shows_what_it_says(name: str) -> None:
    printed = run(name)
    for words in SHOWN[name]:
        assert words in printed


def test_mingpt_in_every_format() -> None:
    printed = run("mingpt_gpt2.py", "--format", "int8")
    assert "MB in int8" in printed
