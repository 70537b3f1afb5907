"""Rules of the house that no linter knows; circles of imports are in test_imports.py."""

import ast
from pathlib import Path

import pytest

from suite.registry import METHODS

ROOT = Path(__file__).parents[1]
FILES = sorted(path for room in ("suite", "kernels_numba", "baselines") for path in (ROOT / room).rglob("*.py"))
# labels, and the definitions of the paper's claims and of what the suite expects of its own methods
MAY_NAME_METHODS = {f"suite/report/{name}.py" for name in ("style", "claims", "expectations")}


def length(function):
    """Lines of a function without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines -= first.end_lineno - first.lineno + 1
    return lines


def names_of_methods(tree):
    """Strings that are a method's name; ``static`` is also what transformers calls a cache."""
    return [
        f"line {node.lineno}: {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in {*METHODS} - {"static"}
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_lengths_and_names(path):
    text = path.read_text(encoding="utf-8")
    tree, name = ast.parse(text), path.relative_to(ROOT).as_posix()
    assert text.count("\n") <= 400
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f"{one.name}: {length(one)} lines" for one in functions if length(one) > 60] == []
    if name.startswith(("suite/speed/", "suite/decoding/", "suite/report/")) and name not in MAY_NAME_METHODS:
        assert names_of_methods(tree) == [], "ask the contract of the method instead"


def test_the_rules_see_a_break():
    long = ast.parse("def f():\n    'doc'\n" + "    x = 1\n" * 60).body[0]
    assert length(long) == 61
    assert names_of_methods(ast.parse("if name == 'cats': pass")) == ["line 1: 'cats'"]
