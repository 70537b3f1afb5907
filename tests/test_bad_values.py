"""Values that break what reads them, through the layer where all of their kind pass: one line, exit 2, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from suite.cli import main
from suite.matrix_file import MOST_DEPTH, read_yaml

MATRIX = """
name: bad
models: [{id: embedded}]
device: cpu
seeds: [SEED]
title: TITLE
accuracy: [{methods: [METHOD], sparsities: [SPARSITY], tasks: [{name: pack_grammar, limit: LIMIT}]}]
"""
GOOD = {"SEED": "0", "TITLE": "t", "METHOD": "dense", "SPARSITY": "0.5", "LIMIT": "2"}
DIGITS = "7" * 5000


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTDOWN_RESULTS", str(tmp_path / "results"))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def line_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a refused command; a line is for people, so a long value is cut."""
    code = main(list(arguments))
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1), err[:2000]
    assert err.startswith("error: ")
    assert len(err) < 600, f"{len(err)} characters"
    return err


def write_matrix(folder: Path, **values: str) -> None:
    text = MATRIX
    for name, value in (GOOD | values).items():
        text = text.replace(name, value)
    (folder / "bad.yaml").write_text(text)


# Scalars that PyYAML's own readers, pydantic or Python's limit on digits choke on: where, the value, what is said
SCALARS: dict[str, tuple[str, str, list[str]]] = {
    "a month 13": ("TITLE", "2024-13-01", ["line 6", "'2024-13-01'", "quotes"]),
    "an hour 25": ("TITLE", "2024-01-01 25:00:00", ["line 6", "timestamp"]),
    "text as timestamp": ("TITLE", "!!timestamp soon", ["line 6", "'soon'"]),
    "text as int": ("SEED", "!!int many", ["line 5", "'many'", "int"]),
    "nothing as int": ("SEED", '!!int ""', ["line 5", "int"]),
    "text as float": ("SPARSITY", "!!float most", ["line 7", "'most'"]),
    "text as bool": ("TITLE", "!!bool perhaps", ["line 6", "'perhaps'"]),
    "broken binary": ("TITLE", "!!binary a", ["line 6"]),
    "5000 digits as seed": ("SEED", DIGITS, ["line 5", "a number of 5000 characters"]),
    "5000 hexadecimal digits": ("SEED", "0x" + DIGITS, ["line 5", "a number of 5002 characters"]),
    "5000 digits as limit": ("LIMIT", DIGITS, ["line 7", "a number of 5000 characters"]),
    "5000 digits as sparsity": ("SPARSITY", DIGITS, ["line 7", "a number of 5000 characters"]),
    "5000 digits in text": ("SEED", f'"{DIGITS}"', ["seeds.0", "(5002 characters)"]),
    "a seed above 64 bits": ("SEED", "9223372036854775808", ["seeds.0", "got 9223372036854775808"]),
    "a limit above 64 bits": ("LIMIT", "9223372036854775808", ["limit", "got 9223372036854775808"]),
    "NUL": ("METHOD", '"den\\0se"', ["line 7", "character"]),
    "lone surrogate": ("TITLE", '"\\ud800"', ["line 6", "character"]),
    "infinite sparsity": ("SPARSITY", ".inf", ["sparsities.0", "inf"]),
    "a text as seed of a method": ("METHOD", "{name: random, params: {seed: lots}}", ["accuracy.0", "seed", "'lots'"]),
    "a list as key": ("TITLE", "{[a]: 1}", ["line 6", "hashable"]),
    "a date as key": ("TITLE", "{2024-01-01: 1}", ["title"]),
    "itself": ("TITLE", "&a [*a]", ["line 6", "itself"]),
}


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_scalar_of_the_matrix(here, capsys, name, verb):
    where, value, words = SCALARS[name]
    write_matrix(here, **{where: value})
    err = line_of(capsys, verb, "bad.yaml")
    for word in words:
        assert word in err
    assert not (here / "results").exists()


def laughs(depth: int) -> str:
    """Anchors nested so deep, nine aliases each: 9 ** depth values."""
    lines = ["a0: &a0 lol"]
    lines += [f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]" for i in range(1, depth + 1)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (laughs(9), "more than 100000 values once aliases are expanded"),
        (laughs(60), "values once aliases are expanded"),
        ("title: " + "[" * 200 + "]" * 200, f"nested more than {MOST_DEPTH} deep"),
        ("title: " + "[" * 100_000, f"nested more than {MOST_DEPTH} deep"),
        ("a0: &a0 x\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 80)), f"more than {MOST_DEPTH} deep"),
    ],
)
def test_a_matrix_that_grows(here, capsys, text, said):
    (here / "bad.yaml").write_text(text)
    err = line_of(capsys, "check", "bad.yaml")
    assert said in err
    assert "bad.yaml" in err


def test_anchors_and_depth_of_a_real_matrix_pass(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(
        "a: &a {x: [1, {y: 2}]}\nb: {<<: *a, z: *a}\nc: {<<: [*a, {x: 2, w: 3}], x: 4}\n"
        + laughs(3)
        + "\nd: "
        + "[" * 40
        + "]" * 40
    )
    data = read_yaml(path)
    assert data["b"] == {"x": [1, {"y": 2}], "z": {"x": [1, {"y": 2}]}}
    assert data["c"] == {"x": 4, "w": 3}
    assert len(data["a3"]) == 9


LONG = "x" * 5000
ARGUMENTS: dict[str, list[str]] = {
    "matrix with a long name": ["check", LONG],
    "matrix file with a long name": ["check", LONG + ".yaml"],
    "long profile": ["reproduce", "--profile", LONG],
    "long model": ["check", "embedded", "--model", LONG],
    "long model folder": ["check", "embedded", "--model", "./" + LONG],
    "long data folder": ["check", "embedded", "--data-dir", LONG],
    "long calibration": ["check", "embedded", "--calibration", "file:" + LONG],
    "long run folder": ["report", LONG],
    "long folder to verify": ["verify", LONG],
    "long results": ["check", "embedded", "--results", LONG],
    "5000 digits as limit": ["check", "embedded", "--limit", DIGITS],
    "5000 digits as seed": ["check", "embedded", "--seed", DIGITS],
    "5000 digits as batch size": ["check", "embedded", "--batch-size", DIGITS],
    "5000 digits as rank": ["check", "embedded", "--rank", DIGITS],
    "5000 digits as threads": ["benchmark", "--threads", DIGITS],
    "5000 digits as sparsity": ["benchmark", "--sparsity", "0." + DIGITS + "x"],
    "5000 digits as new tokens": ["generate", "--prompt", "a", "--max-new-tokens", DIGITS],
    "5000 digits of cells": ["verify", ".", "--recompute", DIGITS],
    "sparsity that overflows": ["benchmark", "--sparsity", DIGITS],
    "lone surrogate": ["check", "\udcff.yaml"],
    "lone surrogate in a prompt": ["generate", "--prompt", "\udcff"],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument(here, capsys, name):
    line_of(capsys, *ARGUMENTS[name])
    assert not list(here.iterdir())


# Modules of a user's own method: source, and what is said beside the module's name
MODULES: dict[str, tuple[str, str]] = {
    "syntax error": ("class Mine(:\n", "SyntaxError"),
    "ValueError": ("raise ValueError('no luck')\n", "ValueError: no luck"),
    "own exception": ("class Odd(Exception): pass\nraise Odd('odd')\n", "Odd: odd"),
    "sys.exit": ("import sys\nsys.exit(0)\n", "SystemExit: 0"),
    "endless recursion": ("def f(): f()\nf()\n", "RecursionError"),
    "import of nothing": ("import no_such_module\n", "no_such_module"),
    "without the class": ("x = 1\n", "has no 'Mine'"),
    "no class": ("Mine = 3\n", "not a subclass"),
    "abstract": ("from suite.methods.base import Method\nclass Mine(Method):\n    name = 'mine'\n", "TypeError"),
    "refusing": (
        "from dataclasses import dataclass\nfrom suite.methods.base import Method\n@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(Method):\n    name = 'mine'\n    def score(self, a): return a.up\n"
        "    def __post_init__(self): raise KeyError('unwanted')\n",
        "unwanted",
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_the_users_own(here, capsys, name):
    source, said = MODULES[name]
    module = "mine_" + name.replace(" ", "_").replace(".", "_").lower()
    (here / f"{module}.py").write_text(source)
    write_matrix(here, METHOD=f"{module}:Mine")
    err = line_of(capsys, "check", "bad.yaml")
    assert said in err
    assert module in err
