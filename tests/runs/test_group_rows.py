"""Averages of a group of lm-eval as rows of groups.csv, from the model to the verification of the folder."""

import math
import shutil
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from suite.cli import main
from suite.evaluation.groups import Group, Weighting
from suite.runs.audit.verify import verify_files
from suite.runs.view.aggregates import GroupCells, aggregate_rows
from suite.runs.view.manifest import seal
from tests.evaluation.test_metrics import CHOICE, ROWS, write_task
from tests.runs.test_aggregated import table
from tests.runs.test_audit import change
from tests.runs.tiny_world import tiny_models

SIZES = {"few": 3, "many": len(ROWS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two tasks of 3 and all rows, and of a group that averages acc by size, acc_norm alike."""
    here = tmp_path_factory.mktemp("groups")
    model = tiny_models(here)[0]
    listed = "".join(f"  - {{metric: {name}}}\n" for name in ("acc", "acc_norm", "f1"))
    for name, size in SIZES.items():
        write_task(here, name, f"{CHOICE}metric_list:\n{listed}", ROWS[:size])
    averages = [
        {"metric": "acc", "aggregation": "mean", "weight_by_size": True},
        {"metric": "acc_norm", "aggregation": "mean", "weight_by_size": False},
        {"metric": "f1", "aggregation": "mean", "weight_by_size": False},
    ]
    group = {"group": "both", "task": list(SIZES), "aggregate_metric_list": averages, "metadata": {"version": 2}}
    (here / "both.yaml").write_text(yaml.safe_dump(group))
    block = {
        "tasks": [{"name": "both", "source": "include"}],
        "methods": ["dense", "random"],
        "modes": ["ideal"],
        "sparsities": [0.99],
        "scopes": ["scored"],
    }
    config = {"name": "groups", "models": [{"id": str(model)}], "device": "cpu", "accuracy": [block]}
    (here / "matrix.yaml").write_text(yaml.safe_dump(config))
    out = here / "run"
    options = ["--include-path", str(here), "--results", str(here / "results"), "--out", str(out)]
    assert main(["run", str(here / "matrix.yaml"), *options]) == 0
    return out


def of_tasks(folder, method, metric) -> Iterator[dict[str, str]]:
    for row in table(folder, "accuracy.csv"):
        if (row["method"], row["metric"]) == (method, metric):
            yield row


def test_a_row_is_the_average_of_the_tasks(folder):
    rows = {(row["method"], row["metric"]): row for row in table(folder, "groups.csv")}
    assert set(rows) == {(method, m) for method in ("dense", "random") for m in ("acc", "acc_norm", "f1")}
    for (method, metric), row in rows.items():
        weights = SIZES if metric == "acc" else dict.fromkeys(SIZES, 1)
        tasks = list(of_tasks(folder, method, metric))
        for column in ("value", *(("delta_dense",) if method != "dense" else ())):
            expected = sum(weights[t["task"]] * float(t[column]) for t in tasks) / sum(weights.values())
            assert float(row[column]) == pytest.approx(expected, abs=1e-9), (method, metric, column)
        assert (row["group"], row["group_version"], row["n_tasks"]) == ("both", "2", "2")
        assert int(row["n_samples"]) == sum(SIZES.values())
    # a task alike: error of a mean of two independent values; by size lm-eval's pooled error
    errors = [float(t["stderr"]) for t in of_tasks(folder, "dense", "acc_norm")]
    assert float(rows["dense", "acc_norm"]["stderr"]) == pytest.approx(math.hypot(*errors) / 2, rel=1e-6)
    from lm_eval.api.metrics import pooled_sample_stderr

    tasks = list(of_tasks(folder, "dense", "acc"))
    pooled = pooled_sample_stderr([float(t["stderr"]) for t in tasks], [int(t["n_samples"]) for t in tasks])
    assert float(rows["dense", "acc"]["stderr"]) == pytest.approx(pooled, rel=1e-6)


def test_a_difference_has_an_interval_where_values_are_means(folder):
    rows = {(row["method"], row["metric"]): row for row in table(folder, "groups.csv")}
    assert rows["random", "acc"]["delta_ci_low"] != ""
    assert rows["random", "f1"]["delta_ci_low"] == ""
    assert rows["dense", "acc"]["delta_dense"] == ""


def test_the_report_has_a_table_of_them(folder):
    text = (folder / "tables" / "groups.md").read_text()
    (row,) = [line for line in text.splitlines() if "| random |" in line and "| acc |" in line]
    assert row.startswith("| both | tiny-llama | random | ideal | 0.99 scored |")
    assert "[" in row
    assert "tables/groups.md" in (folder / "REPORT.md").read_text()


@pytest.mark.parametrize("by_size", [True, False])
def test_the_interval_is_that_of_documents_resampled_within_each_task(by_size):
    draw = np.random.default_rng(0)
    cells, dense, rows, samples, deltas = [], [], {}, {}, []
    for size in (40, 300):
        pair = draw.random((2, size)) < [[0.4], [0.6]]
        names = [f"sparse{size}", f"dense{size}"]
        for name, values in zip(names, pair.astype(float), strict=True):
            samples[name] = {"acc": {str(i): value for i, value in enumerate(values)}}
        common = {"metric": "acc", "filter": "none", "status": "ok", "stderr": 0.1, "chance": None, "n_samples": size}
        delta = pair[0].mean() - pair[1].mean()
        rows[names[0]] = [common | {"value": pair[0].mean(), "delta_dense": delta, "higher_is_better": True}]
        cells.append(SimpleNamespace(id=names[0]))
        dense.append(SimpleNamespace(id=names[1]))
        deltas.append(pair[0].astype(float) - pair[1])
    group = Group("both", "1", ("a", "b"), (Weighting("acc", None, by_size),))
    (row,) = aggregate_rows(GroupCells(group, tuple(cells), tuple(dense)), rows, samples)
    share = np.array([40, 300]) / 340 if by_size else np.array([0.5, 0.5])
    assert row["delta_dense"] == pytest.approx(share @ [d.mean() for d in deltas])
    drawn = [d[draw.integers(0, len(d), (20000, len(d)))].mean(-1) for d in deltas]
    low, high = np.quantile(share @ drawn, [0.025, 0.975])
    # a quantile of 2000 resamples has an error of about 2.7 standard errors / sqrt(2000)
    spread = np.std(share @ drawn) * 4 * 2.7 / math.sqrt(2000)
    assert row["delta_ci_low"] == pytest.approx(low, abs=spread)
    assert row["delta_ci_high"] == pytest.approx(high, abs=spread)


def test_a_group_with_a_task_that_failed_has_no_average():
    rows = {"a": [{"status": "ok", "method": "cats"}], "b": [{"status": "failed", "method": "cats"}]}
    cells = tuple(SimpleNamespace(id=name) for name in rows)
    group = Group("both", "1", ("a", "b"), (Weighting("acc", None, True),))
    (row,) = aggregate_rows(GroupCells(group, cells, cells), rows, {})
    assert (row["status"], row["reason"], row["method"]) == ("failed", "1 of 2 tasks", "cats")
    assert "value" not in row


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("value", "0.123", "value is 0.123, its tasks give"),
        ("stderr", "0.001", "stderr is 0.001, its tasks give"),
        ("n_samples", "5", "n_samples is 5, its tasks have"),
        ("method", "cats", "method is 'cats', not that of its cells"),
        ("status", "failed", "status is failed, its cells are all ok"),
        ("cell_ids", "0" * 16, "cell 0000000000000000 has no row"),
    ],
)
def test_an_edited_row_does_not_verify(folder, tmp_path, column, value, message):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert verify_files(copy) == []

    def edit(rows):
        rows[0][column] = value

    change(copy, "groups.csv", edit)
    seal(copy)
    assert any(message in problem for problem in verify_files(copy)), verify_files(copy)
