"""transformers knows tuckaway's configs in whatever order the two are imported, and neither brings in the other."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


def test_without_transformers_nothing_is_missing() -> None:
    script = (
        "import sys; sys.modules['transformers'] = None; import tuckaway; from tuckaway import *\n"
        "try: tuckaway.TuckawayConfig\n"
        "except ImportError as error: assert 'transformers' in str(error)\n"
        "else: raise AssertionError"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
