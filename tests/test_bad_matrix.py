"""Bad matrices through the command line: one clear line, exit 2, no traceback, nothing written."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.test_bad_input import BLOCK, GOOD, block, folder, refused

__all__ = ["folder"]  # the fixture

# A matrix that is wrong: what it is -> (the matrix, what the line must say)
MATRICES: dict[str, tuple[Any, list[str]]] = {
    "unknown method": (block(methods=["m-countdwn"]), ["'m-countdwn'", "did you mean 'm-countdown'"]),
    "method that does not import": (block(methods=["no_module:X"]), ["accuracy.0.methods", "no_module", "PYTHONPATH"]),
    "method that is not a method": (block(methods=["json:loads"]), ["json:loads", "Method"]),
    "unknown method parameter": (
        block(methods=[{"name": "random", "params": {"sed": 1}}]),
        ["'sed'", "did you mean 'seed'"],
    ),
    "sparsity as parameter": (block(methods=[{"name": "cats", "params": {"sparsity": 0.5}}]), ["sparsities"]),
    "parameter that is not JSON": (
        block(methods=[{"name": "random", "params": {"seed": {1, 2}}}]),
        ["params of method 'random'"],
    ),
    "unknown task": (block(tasks=["pack_gramar"]), ["'pack_gramar'", "did you mean 'pack_grammar'"]),
    "unknown task option": (
        block(tasks=[{"name": "decode_perplexity", "options": {"windw": 3}}]),
        ["'windw'", "did you mean 'window'"],
    ),
    "option of a task without options": (
        block(tasks=[{"name": "pack_grammar", "options": {"window": 9}}]),
        ["pack_grammar", "takes no options"],
    ),
    "window too short": (block(tasks=[{"name": "decode_perplexity", "options": {"window": 1}}]), ["window 1"]),
    "split out of range": (block(tasks=[{"name": "decode_perplexity", "options": {"split": 1.5}}]), ["split 1.5"]),
    "text that is not there": (
        block(tasks=[{"name": "decode_perplexity", "options": {"text": "no.txt"}}]),
        ["no.txt", "no such file"],
    ),
    "source that is not the task's": (
        block(tasks=[{"name": "pack_grammar", "source": "data_dir"}]),
        ["source 'data_dir' wanted", "found in 'pack'"],
    ),
    "data folder task without data folder": (block(tasks=["decode_perplexity_wikitext"]), ["--data-dir"]),
    "limit zero": (block(tasks=[{"name": "pack_grammar", "limit": 0}]), ["accuracy.0.tasks.0.limit", "got 0"]),
    "limit as text": (block(tasks=[{"name": "pack_grammar", "limit": "many"}]), ["limit", "'many'"]),
    "unknown model": (GOOD | {"models": [{"id": "embeded"}]}, ["'embeded'", "did you mean 'embedded'"]),
    "model file that is not there": (GOOD | {"models": [{"id": "./no.gguf"}]}, ["no.gguf", "does not exist"]),
    "model folder that is not there": (
        GOOD | {"models": [{"id": "./nowhere"}]},
        ["./nowhere", "no such file or folder"],
    ),
    "unknown dtype": (
        GOOD | {"models": [{"id": "embedded", "dtype": "fp32"}]},
        ["models.0.dtype", "'fp32'", "float32"],
    ),
    "model without id": (GOOD | {"models": [{"dtype": "float32"}]}, ["models.0.id", "is missing"]),
    "no models": (GOOD | {"models": []}, ["at least one model"]),
    "unknown key at the top": (GOOD | {"sedes": [1]}, ["'sedes'", "did you mean 'seeds'"]),
    "unknown key in a block": (block(sparsites=[0.5]), ["accuracy.0", "'sparsites'", "did you mean 'sparsities'"]),
    "unknown key in a task": (block(tasks=[{"name": "pack_grammar", "limt": 3}]), ["'limt'", "did you mean 'limit'"]),
    "sparsity 1": (block(sparsities=[1.0]), ["accuracy.0.sparsities.0", "must be in [0, 1)", "got 1.0"]),
    "sparsity below 0": (block(sparsities=[-0.1]), ["accuracy.0.sparsities.0", "got -0.1"]),
    "sparsity no number": (block(sparsities=["high"]), ["sparsities.0", "'high'"]),
    "sparsity NaN": (block(sparsities=[float("nan")]), ["sparsities.0", "nan"]),
    "sparsity true": (block(sparsities=[True]), ["sparsities.0", "True"]),
    "no sparsity": (block(sparsities=[]), ["accuracy.0.sparsities", "must not be empty"]),
    "no method": (block(methods=[]), ["accuracy.0.methods", "must not be empty"]),
    "no task": (block(tasks=[]), ["accuracy.0.tasks", "must not be empty"]),
    "empty matrix": ({"name": "bad", "models": [{"id": "embedded"}]}, ["empty matrix", "accuracy or speed"]),
    "no name": ({key: GOOD[key] for key in GOOD if key != "name"}, ["name", "is missing"]),
    "name with a slash": (GOOD | {"name": "../up"}, ["name", "'../up'", "letters"]),
    "same sparsity twice": (block(sparsities=[0.5, 0.50]), ["duplicate cell", "accuracy.0"]),
    "same block twice": (GOOD | {"accuracy": [BLOCK, BLOCK]}, ["duplicate cell in accuracy.0 and accuracy.1"]),
    "rank 0 of a predictor": (
        block(methods=["d-countdown"], modes=["practical"]) | {"predictor": {"ranks": [0]}},
        ["predictor.ranks.0", "greater than or equal to 1", "got 0"],
    ),
    "input that no predictor reads": (
        block() | {"predictor": {"predictor_inputs": ["mlp", "block"]}},
        ["predictor", "predictor_inputs block: only gated predictors read it"],
    ),
    "block for no model": (
        block(min_parameters=2e9, max_parameters=1e9),
        ["min_parameters of a block: not below its max_parameters"],
    ),
    "mode that a method has not": (block(methods=["random"], modes=["practical"]), ["'random'", "no mode 'practical'"]),
    "unknown mode": (block(modes=["real"]), ["accuracy.0.modes.0", "'real'"]),
    "unknown scope": (block(scopes=["prompt"]), ["accuracy.0.scopes.0", "'prompt'"]),
    "unknown estimator": (GOOD | {"calibration": {"estimators": ["median"]}}, ["estimators.0", "'median'"]),
    "unknown calibration": (
        block(modes=["practical"], methods=["cats"]) | {"calibration": {"source": "wikipedia"}},
        ["unknown calibration 'wikipedia'"],
    ),
    "calibration file that is not there": (
        block(modes=["practical"], methods=["cats"]) | {"calibration": {"source": "file:no.txt"}},
        ["no.txt"],
    ),
    "unknown device": (GOOD | {"device": "gpu0"}, ["device", "'gpu0'"]),
    "batch size 0": (GOOD | {"batch_size": 0}, ["batch_size", "got 0"]),
    "more new tokens than memory": (
        GOOD | {"analysis": {"new_tokens": 10**9}},
        ["analysis.new_tokens", "less than or equal to 16777216", "got 1000000000"],
    ),
    "negative seed": (GOOD | {"seeds": [-1]}, ["seeds.0", "got -1"]),
    "data folder that is not there": (
        block(tasks=["arc_easy"]) | {"data_dir": "no/data"},
        ["data folder", "no such folder"],
    ),
    "include path that is not there": (
        block(tasks=["my_task"]) | {"include_path": "no/tasks"},
        ["include_path", "no such folder"],
    ),
    "list instead of a mapping": ([GOOD], ["must be a mapping"]),
    "models as text": (GOOD | {"models": "embedded"}, ["models", "list"]),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("verb", ["check", "run"])
def test_bad_matrix(folder, capsys, name, verb):
    data, words = MATRICES[name]
    (folder / "bad.yaml").write_text(yaml.dump(data))
    err = refused(capsys, verb, "bad.yaml")
    for word in words:
        assert word in err
    assert not (folder / "results").exists()


# A file of the matrix that is not a matrix: its bytes -> what the line must say
FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["bad.yaml", "empty"]),
    "broken YAML": (b"name: x\nmodels: [a\nseeds: 1\n", ["bad.yaml", "line 3", "broken YAML"]),
    "tab": (b"name: x\n\tmodels: []\n", ["bad.yaml", "line 2"]),
    "key twice": (b"name: x\nseeds: [1]\nseeds: [2]\n", ["line 3", "'seeds' is given twice"]),
    "binary": (b"\xff\xfe\x00\x01", ["bad.yaml", "UTF-8"]),
    "python object": (b"name: !!python/object/apply:os.system ['true']\n", ["bad.yaml", "line 1"]),
    "only text": (b"hello\n", ["must be a mapping"]),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_matrix_file(folder, capsys, name):
    data, words = FILES[name]
    (folder / "bad.yaml").write_bytes(data)
    err = refused(capsys, "check", "bad.yaml")
    for word in words:
        assert word in err
