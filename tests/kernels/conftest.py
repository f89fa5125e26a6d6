"""A process with Triton's interpreter: it must be asked for before Triton is imported, and only there."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from tuckaway_kernels.backend import has_triton


def _serve(request: bytes) -> bytes:
    module, function, args = pickle.loads(request)
    warnings.simplefilter("ignore")  # numpy's, on 0 * inf and NaN
    result = getattr(importlib.import_module(module), function)(*args)
    return pickle.dumps([a for a in args if isinstance(a, torch.Tensor)] if result is None else result)


@pytest.fixture(scope="session")
def interpret() -> Iterator[Callable[..., Any]]:
    """Give ``interpret(module, function, *args)``: call it where kernels run on CPU tensors.

    A function that returns nothing gives back its tensor arguments, written to.
    """
    if not has_triton():
        pytest.skip("Triton is not installed")
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before

    def call(module: str, function: str, *args: object) -> Any:
        return pickle.loads(pool.submit(_serve, pickle.dumps((module, function, args))).result())

    with pool:
        yield call
