"""Reading run folders: whole, unfinished, broken."""

import gzip
import json

import numpy as np
import pytest

from suite.errors import InputError
from suite.report.page import write_report
from suite.report.results import load_results
from suite.runs.view.manifest import read_manifest
from tests.report.synthetic import accuracy_row, manifest, write_run


@pytest.fixture
def run(tmp_path):
    row = accuracy_row("dense", "pack_grammar", "acc", 0.5, batch_size="8.0", reason="")
    samples = [("c", "pack_grammar", "t1/07", "acc", 1.0), ("c", "pack_grammar", "007", "acc", 0.0)]
    return write_run(tmp_path / "run", [row, row | {"value": ""}], samples, manifest=manifest())


def test_columns_are_typed_and_empty_cells_are_missing(run):
    results = load_results(run)
    assert results.accuracy["value"].tolist()[0] == 0.5
    assert np.isnan(results.accuracy["value"].tolist()[1])
    assert results.accuracy["mode"].tolist() == ["none", "none"]  # text, not pandas' idea of a missing value
    assert results.accuracy["stderr"].isna().all()
    assert results.accuracy["batch_size"].tolist() == ["8", "8"]
    assert results.samples["doc_id"].tolist() == ["t1/07", "007"]
    assert results.name == "synthetic"


def test_files_that_are_not_there_yet_give_no_rows(run):
    results = load_results(run)
    for frame in (results.speed, results.sparsity, results.predictor, results.claims, results.cif_caf):
        assert frame.empty
    assert "latency_us_median" in results.speed
    (run / "manifest.json").unlink()
    assert load_results(run).manifest == {}
    assert load_results(run).name == "run"


def test_a_newer_schema_is_refused(run):
    (run / "manifest.json").write_text(json.dumps(manifest(schema_version=99)))
    with pytest.raises(InputError, match=r"manifest\.json: schema_version 99 is newer than 3.*update countdown-suite"):
        load_results(run)


def test_minus_infinity_is_a_threshold(tmp_path):
    layer = {"cell_id": "c", "layer": 0, "threshold": "-inf", "sparsity_target": 0}
    run = write_run(tmp_path / "run", [], sparsity=[layer], manifest=manifest())
    assert load_results(run).sparsity["threshold"].tolist() == [-np.inf]


def _replace(run, name, old, new):
    path = run / name
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda run: _replace(run, "accuracy.csv", "0.5", "half"), r"accuracy\.csv line 2, column value: 'half' is no"),
        (lambda run: _replace(run, "accuracy.csv", "chance", "luck"), "has no column 'chance'"),
        (lambda run: (run / "accuracy.csv").write_text(""), "cannot be read as CSV"),
        (lambda run: (run / "accuracy.csv").open("a").write("x\n"), r"accuracy\.csv line \d+: a row without status"),
        (lambda run: (run / "accuracy.csv").write_bytes(b"\xff\xfe\x00"), "cannot be read as CSV"),
        (lambda run: (run / "samples.csv.gz").write_bytes(gzip.compress(b"a" * 500)[:20]), "cannot be read as CSV"),
        (lambda run: (run / "samples.csv.gz").write_bytes(b"no gzip"), "cannot be read as CSV"),
        (lambda run: (run / "manifest.json").write_text("{"), "is broken"),
        (lambda run: (run / "manifest.json").write_text("[]"), "must hold a JSON object"),
        (lambda run: (run / "manifest.json").write_text('{"schema_version": "new"}'), "not a whole number"),
    ],
)
def test_a_broken_file_is_named_in_one_line(run, harm, message):
    harm(run)
    with pytest.raises(InputError, match=message) as caught:
        load_results(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"cells": value} for value in ([], {"a": "x"}, {"a": {"kind": "accuracy", "status": 3, "fields": {}}})),
        *({name: 3} for name in ("config", "in_domain", "files", "title", "run_id", "models", "unsealed", "seeds")),
        {"unsealed": [[]]},
        {"files": {"a": []}},
        {"config": {"calibration": {"max_tokens": 4}}},
        {"config": {"calibration": "pydoc"}},
        {"schema_version": True},
    ],
)
def test_a_wrongly_typed_manifest_is_refused_by_every_reader(run, wrong):
    (run / "manifest.json").write_text(json.dumps(manifest() | wrong))
    for read in (load_results, read_manifest, write_report):
        with pytest.raises(InputError, match=rf"manifest\.json is broken: .*{next(iter(wrong))}"):
            read(run)


def test_a_manifest_nested_too_deep_is_one_line(run):
    (run / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="nested too deep"):
        load_results(run)


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_results(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a run folder"):
        load_results(tmp_path)
