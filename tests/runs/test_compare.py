"""Comparing run folders: every row takes part, whatever it differs in from the next one."""

import csv
import shutil
from pathlib import Path

import pytest

from suite.runs.audit.compare import compare
from tests.report.synthetic import accuracy_row, manifest, write_run

REFERENCE = Path(__file__).parents[2] / "results" / "reference"


@pytest.mark.parametrize(
    ("run", "name", "column"),
    [("h100-decode", "speed.csv", "latency_us_median"), ("h100-accuracy", "accuracy.csv", "value")],
)
def test_a_change_of_any_row_is_seen(tmp_path, run, name, column):
    """Contexts, ranks, and fits on several texts tell rows apart; equal settings are told apart by their number."""
    for file in ("manifest.json", name):
        shutil.copy(REFERENCE / run / file, tmp_path / file)
    with (tmp_path / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows.append(dict(rows[-1]))  # a twin
    with (tmp_path / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, column: "7.25"} for row in rows)
    lines = compare(REFERENCE / run, tmp_path)
    assert f"{name}: {len(rows) - 1} rows in both, 0 only in A, 1 only in B" in lines
    assert f"  {column}: 0 equal, {len(rows) - 1} differ" in lines


def test_what_stands_alone_is_counted_beyond_the_first(tmp_path):
    lines = compare(REFERENCE / "h100-kernels", REFERENCE / "h100-decode")
    assert "speed.csv: 0 rows in both, 421 only in A, 94 only in B" in lines
    assert "  and 411 more only in A" in lines
    assert "  and 84 more only in B" in lines


def test_the_split_of_the_examples_is_said(tmp_path):
    splits = {"same": ("train", "train"), "moved": ("train", "test (scored)"), "older": ("", "train"), "none": ("", "")}
    for i, folder in enumerate(("a", "b")):
        rows = [accuracy_row("dense", t, "acc", 0.5, fewshot_split=pair[i]) for t, pair in splits.items()]
        described = manifest(run_id=folder, cells={}, key_common={}, config={})
        write_run(tmp_path / folder, rows, manifest=described)
    lines = [line for line in compare(tmp_path / "a", tmp_path / "b") if line.startswith("  examples of")]
    assert lines == [
        "  examples of moved: from train -> test (scored)",
        "  examples of older: from an unknown split -> train",
        "  examples of same: from train",
    ]
