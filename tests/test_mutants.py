from __future__ import annotations

import ast

from mutants import mutate, places

SOUND = '''
"""Of a module."""
__all__ = ["f"]

@cached(1)
def f(a: int = 1) -> int:
    """Of a function."""
    if a < 2 and not a:
        raise ValueError(f"{a + 1} is wrong", 3)
    g(a)
    return getattr(a, "b", 0) + a
'''


def test_every_mutant_is_another_program_and_none_of_its_words_change():
    tree = ast.parse(SOUND)
    mutants = [ast.unparse(mutate(tree, at)[0]) for at in range(len(list(places(tree))))]
    assert len(mutants) == len(set(mutants)) == 13
    assert ast.unparse(tree) == ast.unparse(ast.parse(SOUND))
    for mutant in mutants:
        compile(mutant, "mutant", "exec")
        assert "@cached(1)" in mutant
        assert "'b', 0" in mutant or "return None" in mutant
