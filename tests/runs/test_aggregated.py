"""Metrics that are not means, from the model to the tables of a run folder, its report and its verification."""

import csv
import gzip
import json
import shutil

import pytest
import yaml

from suite.cli import main
from suite.runs.audit.verify import verify_files
from suite.runs.view.manifest import read_manifest, seal
from tests.evaluation.test_metrics import CHOICE, ROWS, write_task
from tests.runs.test_audit import change
from tests.runs.tiny_world import tiny_models


def table(folder, name):
    path = folder / name
    with gzip.open(path, "rt") if name.endswith(".gz") else path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("aggregated")
    model = tiny_models(here)[0]
    listed = "".join(f"  - {{metric: {name}}}\n" for name in ("acc", "f1", "mcc"))
    write_task(here, "words", f"{CHOICE}metric_list:\n{listed}", ROWS)
    block = {
        "tasks": [{"name": "words", "source": "include"}],
        "methods": ["dense", "m-countdown"],
        "modes": ["ideal"],
        "sparsities": [0.9],
        "scopes": ["scored"],
    }
    config = {"name": "aggregated", "models": [{"id": str(model)}], "device": "cpu", "accuracy": [block]}
    (here / "matrix.yaml").write_text(yaml.safe_dump(config))
    out = here / "run"
    options = ["--include-path", str(here), "--results", str(here / "results"), "--out", str(out)]
    assert main(["run", str(here / "matrix.yaml"), *options]) == 0
    return out


def test_value_difference_interval_and_items_are_in_the_tables(folder):
    rows = {(row["metric"], row["method"]): row for row in table(folder, "accuracy.csv")}
    assert rows["f1", "dense"]["aggregation"] == "f1"
    assert rows["acc", "dense"]["aggregation"] == ""
    for metric in ("f1", "mcc"):
        sparse, dense = rows[metric, "m-countdown"], rows[metric, "dense"]
        delta = float(sparse["value"]) - float(dense["value"])
        assert float(sparse["delta_dense"]) == pytest.approx(delta, abs=1e-9)
        assert float(sparse["delta_ci_low"]) <= delta <= float(sparse["delta_ci_high"])
    samples = table(folder, "samples.csv.gz")
    assert {(row["n_choices"], row["n_gold"]) for row in samples} == {("2", "1")}
    items = [json.loads(row["item"]) for row in samples if row["metric"] == "f1"]
    assert len(items) == 2 * len(ROWS)
    assert all(len(item) == 2 for item in items)


def test_the_folder_verifies_and_an_edited_value_does_not(folder, tmp_path):
    assert verify_files(folder) == []
    copy = shutil.copytree(folder, tmp_path / "run")

    def edit(rows):
        next(row for row in rows if (row["metric"], row["method"]) == ("f1", "dense"))["value"] = "0.123"

    change(copy, "accuracy.csv", edit)
    seal(copy)
    assert any("f1" in problem and "0.123" in problem for problem in verify_files(copy))
    assert read_manifest(folder)["schema_version"] == 3
