"""Tables: which columns tell rows apart, their order, how cells are read, and folders of older versions."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest

from suite import schema
from suite.methods.base import NEURONS

REFERENCE = Path(__file__).parents[1] / "results" / "reference"
UNITS = {"us": "us", "s": "s", "mib": "MiB", "share": "share"}


@pytest.mark.parametrize("table", schema.TABLES, ids=lambda table: table.file)
def test_names_are_distinct_and_say_their_unit(table):
    assert len(set(table.names)) == len(table.names)
    for column in table.columns:
        words = column.name.removesuffix("_per_s").removesuffix("_gb_s").split("_")
        if column.is_number and words[-1] in UNITS:
            assert column.unit == UNITS[words[-1]], column.name


@pytest.mark.parametrize("table", schema.TABLES, ids=lambda table: table.file)
@pytest.mark.parametrize("run", sorted(path.name for path in REFERENCE.iterdir()))
def test_cells_of_committed_runs_are_of_their_columns_kind_and_rows_are_distinct(run, table):
    path = REFERENCE / run / table.file
    if not path.exists():
        pytest.skip("not in this run")
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows[:2000]:
        for name, text in row.items():
            column = table.column(name)
            assert column.kind == "exact" or column.text(column.parse(text)) == text
    if table is not schema.CLAIMS:  # whose untested rows differ in their reason alone
        assert len({table.key(row) for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("text", "", ""), ("text", "1", "1"), ("number", "", None), ("number", "-inf", float("-inf")), ("exact", ".5", 0.5),
        ("count", "3", 3), ("whole", "2.0", 2), ("flag", "true", True), ("flag", "", None),
    ],
)  # fmt: skip
def test_a_cell_is_read_as_its_kind(kind, text, value):
    assert schema.Column("c", kind, "fact").parse(text) == value


@pytest.mark.parametrize(("kind", "text"), [("number", "x"), ("whole", "1.5"), ("count", "x"), ("flag", "True")])
def test_a_cell_of_another_kind_is_refused(kind, text):
    with pytest.raises(ValueError, match=repr(text) if kind != "number" and text != "x" else "could not convert"):
        schema.Column("c", kind, "fact").parse(text)


def test_exact_numbers_keep_all_digits():
    assert schema.SAMPLES.column("value").text(1 / 3) == "0.3333333333333333"
    assert schema.ACCURACY.column("value").text(1 / 3) == "0.3333333333"


def test_rows_are_sorted_by_every_column_that_tells_them_apart():
    for table in (schema.ACCURACY, schema.GROUPS, schema.SPEED):
        for name in table.identity:
            rows = [{"cell_id": "b", name: 1}, {"cell_id": "a", name: 2}]
            assert table.sorted(rows[::-1]) == rows, name


def test_listed_rows_stay_in_their_order():
    rows = [{"cell_id": "a", "phase": "wait"}, {"cell_id": "a", "phase": "fill"}]
    assert schema.PHASES.sorted(rows) == rows


def test_columns_since():
    assert schema.SPARSITY.since(2) == [name for name in schema.SPARSITY.names if name != "site"]
    assert "chat" not in schema.ACCURACY.since(1)
    assert schema.ACCURACY.since(schema.SCHEMA_VERSION) == schema.ACCURACY.names


def test_a_row_of_an_older_folder_is_of_the_site_there_was():
    new = {"cell_id": "a", "layer": "0", "site": NEURONS}
    old = {"cell_id": "a", "layer": "0"}
    assert schema.SPARSITY.key(new) == schema.SPARSITY.key(old)
