"""Models that share the last part of their names are told apart in every table, and in full in the manifest."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from suite.cli_actions import report
from suite.config import build_config
from suite.modeling.names import distinct_names
from suite.modeling.sources import EMBEDDED_NAME, ModelRef
from suite.runs.audit.verify import verify_files
from suite.runs.machine import LocalWorld
from suite.runs.run import Options, run
from tests.runs.fakes import FakeWorker


def ref(spec: str) -> ModelRef:
    if spec == "embedded":
        return ModelRef(spec, "embedded", EMBEDDED_NAME, None, True, "", None)
    if spec.endswith(".gguf"):
        return ModelRef(spec, "gguf", Path(spec).stem, Path(spec), True, "", None)
    kind = "folder" if spec.startswith("/") else "hub"
    return ModelRef(spec, kind, spec.partition("@")[0].rpartition("/")[2], Path(spec), True, "", None)


@pytest.mark.parametrize(
    ("specs", "names"),
    [
        (["/m/a/final"], ["final"]),
        (["/m/a/final", "/m/b/other"], ["final", "other"]),
        (["/m/a/final", "/m/b/final"], ["a/final", "b/final"]),
        (["/m/a/x/final", "/m/b/x/final", "/m/c/y/final"], ["a/x/final", "b/x/final", "y/final"]),
        (["org1/X", "org2/X", "org2/Y"], ["org1/X", "org2/X", "Y"]),
        (["org1/X@v1"], ["X"]),
        (["org1/X", "org1/X@v1"], ["X@main", "X@v1"]),
        (["org1/X", "org1/X@main"], ["X", "X"]),
        (["org1/X@v1", "org1/X@v2", "org2/X"], ["X@v1", "X@v2", "X"]),
        (["/m/a/x.gguf", "/m/b/x.gguf"], ["a/x", "b/x"]),
        (["/m/x", "/m/x.gguf"], ["x", "x.gguf"]),
        (["org/X", "/m/org/X"], ["org/X", "m/org/X"]),
        (["embedded", "HuggingFaceTB/" + EMBEDDED_NAME], [EMBEDDED_NAME, "HuggingFaceTB/" + EMBEDDED_NAME]),
        (["/m/" + EMBEDDED_NAME, "embedded"], ["m/" + EMBEDDED_NAME, EMBEDDED_NAME]),
        (["embedded", EMBEDDED_NAME], [EMBEDDED_NAME, EMBEDDED_NAME + "@main"]),
    ],
)
def test_the_shortest_names_that_differ(specs, names):
    assert distinct_names([ref(spec) for spec in specs]) == dict(zip(specs, names, strict=True))


def stub(folder: Path, value: float) -> Path:
    """A folder that is a model as far as keys and names go."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    save_file({"w": np.full(1, value, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def test_tables_and_manifest_of_two_folders_of_one_name(tmp_path):
    ids = [str(stub(tmp_path / "models" / name / "final", i)) for i, name in enumerate("ab")]
    block = {"methods": ["dense", "cats"], "sparsities": [0.5, 0.9], "tasks": ["pack_last_word"]}
    models = [{"id": ids[0]}, {"id": ids[1]}, {"id": ids[1], "dtype": "bfloat16"}]
    config = build_config({"name": "n", "device": "cpu", "models": models, "accuracy": [block]}, "test")
    folder = tmp_path / "run"
    run(config, LocalWorld(config), FakeWorker(), Options(tmp_path, folder), report=report)

    with (folder / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {"a/final", "b/final"}
    manifest = json.loads((folder / "manifest.json").read_text())
    own = {name: (one["id"], one["dtypes"]) for name, one in manifest["models"].items()}
    assert own == {
        "a/final": ("{model_dir}/a/final", ["float32"]),
        "b/final": ("{model_dir}/b/final", ["bfloat16", "float32"]),
    }
    named = [model["id"] for model in manifest["config"]["models"]]
    assert named == ["{model_dir}/a/final", *["{model_dir}/b/final"] * 2]
    assert all(name in (folder / "REPORT.md").read_text() for name in own)
    assert str(tmp_path) not in (folder / "manifest.json").read_text()
    assert verify_files(folder) == []


def test_the_embedded_model_that_is_timed_keeps_its_name(tmp_path):
    other = stub(tmp_path / "mine" / EMBEDDED_NAME, 0)
    decode = {"level": "decode", "shapes": ["embedded"], "methods": ["dense"], "sparsities": [0.0]}
    accuracy = {"methods": ["dense"], "tasks": ["pack_last_word"], "sparsities": [0.5]}
    matrix = {"name": "n", "device": "cpu", "models": [{"id": str(other)}], "accuracy": [accuracy]}
    assert LocalWorld(build_config(matrix, "test")).model_name(str(other)) == EMBEDDED_NAME
    timed = LocalWorld(build_config(matrix | {"speed": [decode]}, "test"))
    assert timed.model_name(str(other)) == f"mine/{EMBEDDED_NAME}"
