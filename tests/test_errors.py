"""The tree of errors: what they are, what they say, and that they survive a process pool."""

from __future__ import annotations

import inspect
import pickle

import pytest

from tuckaway import errors
from tuckaway.errors import TuckawayError, nearest_names

CLASSES = [
    value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, TuckawayError)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
class TestEveryError:
    def test_is_public_and_in_the_tree_of_the_docstring(self, kind: type[TuckawayError]) -> None:
        assert kind.__name__ in errors.__all__
        assert kind.__name__ in (errors.__doc__ or "")
        assert kind.__doc__

    def test_message(self, kind: type[TuckawayError]) -> None:
        assert str(kind("no such thing")) == "no such thing"
        assert str(kind("no such thing", where="a.bin")) == "no such thing (a.bin)"
        error = kind("no such thing", where="a.bin", hint="look elsewhere")
        assert str(error) == "no such thing (a.bin). look elsewhere"
        assert (error.what, error.where, error.hint) == ("no such thing", "a.bin", "look elsewhere")

    def test_survives_pickling(self, kind: type[TuckawayError]) -> None:
        error = kind("no such thing", where="a.bin", hint="look elsewhere")
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is kind
        assert str(copy) == str(error)
        assert (copy.what, copy.where, copy.hint) == (error.what, error.where, error.hint)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.CheckpointNotFound, FileNotFoundError),
        (errors.KeyMismatch, ValueError),
        (errors.PlanError, ValueError),
        (errors.PagingError, RuntimeError),
        (errors.StoreFull, OSError),
        (errors.LoadOutOfMemoryError, MemoryError),
    ],
)
def test_builtin_kin(kind: type[TuckawayError], builtin: type[Exception]) -> None:
    assert issubclass(kind, builtin)
    with pytest.raises(builtin, match="wrong"):
        raise kind("wrong")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lm_haed.weight", "did you mean 'lm_head.weight'?"),
        ("model.layer.0.w", "did you mean 'model.layers.0.w' or 'layers.0.w'?"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_nearest_names(name: str, expected: str) -> None:
    candidates = (n for n in ["lm_head.weight", "model.layers.0.w", "layers.0.w", "wte"])
    assert nearest_names(name, candidates) == expected
