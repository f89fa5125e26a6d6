"""How many faults put into the parsers and ``files/`` the tests notice: ``python tests/mutants.py``.

A *mutant* is one of those modules with one thing changed: a comparison, an operator, a number, a call left out. It is
killed when a test fails. What is not behaviour is not changed: annotations, docstrings, decorators, ``__all__``, the
wording and the excerpts of messages; nor what ``getattr`` returns on other systems. Each mutant is tried in a process
forked from one that has imported torch, on a copy of the tree, with its module's own tests.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES, CHECKPOINT = "src/tuckaway/files", "src/tuckaway/checkpoint"
TESTS = {  # the fewest tests that say most of a module
    f"{FILES}/atomic.py": ["tests/files"],
    f"{FILES}/checksum.py": ["tests/files/test_checksum.py"],
    f"{FILES}/lock.py": ["tests/files"],
    f"{FILES}/system.py": ["tests/files"],
    f"{CHECKPOINT}/entry.py": ["tests/checkpoint/test_entry.py", "tests/checkpoint/test_reader.py"],
    f"{CHECKPOINT}/header.py": ["tests/checkpoint/test_header.py", "tests/checkpoint/test_index.py"],
    f"{CHECKPOINT}/index.py": [f"tests/checkpoint/test_{name}.py" for name in ("index", "entry", "seal")],
    f"{CHECKPOINT}/seal.py": ["tests/checkpoint/test_seal.py", "tests/checkpoint/test_entry.py"],
}
LIMIT = 30.0  # seconds after which a mutant counts as killed: five times what the slowest tests take
SLOW = (
    "the_time_to_read or any_file or mutations_of or killed_holder or nothing_is_mapped or every_truncation"
)
MESSAGES = {"_bad", "_truncated", "_disagree"}  # make errors, as classes with a name in capitals do
WORDING = {"__all__", "what", "hint", "more", "where", "listing"}  # names of parts of messages
COMPARED = {
    **{
        ast.Lt: ast.LtE,
        ast.LtE: ast.Lt,
        ast.Gt: ast.GtE,
        ast.GtE: ast.Gt,
        ast.Eq: ast.NotEq,
        ast.NotEq: ast.Eq,
    },
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}
OPERATORS = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr},
    **{ast.BitXor: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.Div: ast.Mult},
}


def _message(node: ast.AST) -> bool:
    """Whether a call makes an error."""
    called = node.func if isinstance(node, ast.Call) else None
    name = called.id if isinstance(called, ast.Name) else ""
    return name in MESSAGES or name.endswith(("Error", "NotFound", "Busy", "Full"))


def places(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.AST, str]]:
    """Yield every node that can be changed and how; ``inside`` a function."""
    if (
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in WORDING
    ):
        return
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.AnnAssign) and node.value is None):
        return
    if inside:
        yield from ((node, kind) for kind in _kinds(node))
    function = isinstance(node, ast.FunctionDef)
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases"):
            continue
        if field in ("args", "keywords") and _message(node):
            continue
        children = [
            child for child in (value if isinstance(value, list) else [value]) if isinstance(child, ast.AST)
        ]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            children = children[:2] if field == "args" else []
        for child in children:
            yield from places(child, inside or function or isinstance(node, ast.Assign | ast.AnnAssign))


def _kinds(node: ast.AST) -> list[str]:
    """The ways to change one node."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        return (
            ["other comparison", "opposite"]
            if isinstance(node.ops[0], ast.Lt | ast.Gt)
            else ["other comparison"]
        )
    if isinstance(node, ast.BoolOp):
        return ["and for or", *(f"without operand {at}" for at in range(len(node.values)))]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return ["other operator"]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ["without not"]
    if isinstance(node, ast.Constant) and type(node.value) in (int, bool):
        return ["other constant"]
    if isinstance(node, ast.IfExp):
        return ["other condition"]
    if isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        return ["returns None"]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return ["left out"]
    if isinstance(node, ast.Raise):
        return ["left out", "other error"] if node.exc is not None else ["left out"]
    if isinstance(node, ast.Assign | ast.AugAssign):
        return ["None assigned"] if isinstance(node, ast.Assign) else ["left out"]
    if isinstance(node, ast.Break | ast.Continue):
        return ["left out"]
    return []


def mutate(tree: ast.Module, at: int) -> tuple[ast.Module, str]:
    """Return a copy of a module with its ``at``-th place changed, and what was."""
    tree = copy.deepcopy(tree)
    node, kind = list(places(tree))[at]
    what = f"line {getattr(node, 'lineno', 0)}: {kind}: {ast.unparse(node).splitlines()[0][:90]}"
    if isinstance(node, ast.Compare):
        if kind == "opposite":
            node.ops[0] = ast.GtE() if isinstance(node.ops[0], ast.Lt) else ast.LtE()
        else:
            node.ops[0] = COMPARED[type(node.ops[0])]()
    elif isinstance(node, ast.BoolOp):
        if kind == "and for or":
            node.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        else:
            node.values[int(kind.split()[-1])] = ast.Constant(isinstance(node.op, ast.And))
    elif isinstance(node, ast.BinOp):
        node.op = OPERATORS[type(node.op)]()
    elif isinstance(node, ast.UnaryOp):
        node.operand = ast.UnaryOp(ast.Not(), node.operand)
    elif isinstance(node, ast.Constant):
        node.value = (not node.value) if isinstance(node.value, bool) else int(str(node.value)) + 1
    elif isinstance(node, ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Return | ast.Assign):
        node.value = ast.Constant(None)
    elif isinstance(node, ast.Raise) and kind == "other error":
        node.exc, node.cause = ast.parse("AssertionError('mutant')", mode="eval").body, None
    else:
        _leave_out(tree, node)
    return ast.fix_missing_locations(tree), what


def _leave_out(tree: ast.Module, node: ast.AST) -> None:
    for parent in ast.walk(tree):
        for _, value in ast.iter_fields(parent):
            if isinstance(value, list) and node in value:
                value[value.index(node)] = ast.Pass()


def _run(copied: Path, tests: list[str]) -> int:
    """Run tests and return pytest's exit status; what they print goes to a file."""
    import pytest

    os.setsid()
    os.chdir(copied)
    output = os.open(copied / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    options = ["-x", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", "--hypothesis-seed=0", "--tb=short"]
    options += [
        "-m",
        "not slow and not heavy",
        "-k",
        f"not ({SLOW})",
        f"--basetemp={copied / 'temporary'}",
        "-o",
        "addopts=",
    ]
    return pytest.main([*options, "--import-mode=importlib", *tests])


def survives(copied: Path, tests: list[str], limit: float) -> bool:
    """Run tests in a process of their own and say whether they passed within ``limit`` seconds."""
    child = os.fork()
    if child == 0:
        try:
            code = _run(copied, tests)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(70)
    until = time.monotonic() + limit
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _copy() -> Path:
    """Copy what the tests need to a folder of its own, and import from there."""
    copied = Path(tempfile.mkdtemp(prefix="mutants-"))
    for name in ("src", "kernels", "tests"):
        shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copied)
    paths = [str(copied / name) for name in ("src", "kernels")]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # two mutants of one size and second would share it
    return copied


def _try(copied: Path, name: str, tree: ast.Module, limit: float) -> bool:
    """Write a mutant, run its tests, put the module back, and say whether it survived."""
    path = copied / name
    sound = path.read_text()
    path.write_text(ast.unparse(tree))
    try:
        return survives(copied, TESTS[name], limit)
    finally:
        path.write_text(sound)


def main() -> None:
    """Try a sample of the mutants and print those that survived and the score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sample", type=int, help="how many; all of them when not given")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", default="", help="modules whose path has this in it")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th of the sample from the I-th on")
    options = parser.parse_args()
    trees = {name: ast.parse((ROOT / name).read_text()) for name in TESTS}
    pool = [(name, at) for name, tree in trees.items() for at in range(len(list(places(tree))))]
    random.Random(options.seed).shuffle(pool)
    part, parts = map(int, options.part.split("/"))
    chosen = [(name, at) for name, at in pool[: options.sample] if options.only in name][part::parts]
    print(f"{len(pool)} mutants, {len(chosen)} to be tried", flush=True)

    import psutil
    import pytest
    import safetensors.torch
    import torch

    del psutil, pytest, safetensors, torch  # imported here once, for every process forked
    copied = _copy()
    try:
        for tests in {tuple(tests): tests for tests in TESTS.values()}.values():
            if not survives(copied, tests, 300):
                sys.exit(f"{tests} fail without a mutant:\n{(copied / 'output').read_text()[-3000:]}")
        killed = 0
        for done, (name, at) in enumerate(chosen):
            if done and done % 20 == 0:
                print(f"killed {killed} of {done}", flush=True)
            tree, what = mutate(trees[name], at)
            if _try(copied, name, tree, LIMIT):
                print(f"survived: {name}, {what}", flush=True)
            else:
                killed += 1
        print(f"killed {killed} of {len(chosen)}: {100 * killed / max(1, len(chosen)):.1f} %")
    finally:
        shutil.rmtree(copied)


if __name__ == "__main__":
    main()
