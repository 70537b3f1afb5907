"""results/README.md explains every column of every CSV."""

import re
from pathlib import Path

import pytest

from suite import schema

README = Path(__file__).parents[2] / "results" / "README.md"


@pytest.mark.parametrize("table", schema.TABLES, ids=lambda table: table.file)
def test_every_column_is_explained(table):
    section = README.read_text(encoding="utf-8").partition(f"\n## {table.file}\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    explained = [column for row in rows for column in re.findall(r"`([a-z0-9_]+)`", row)]
    assert explained == table.names, f"in order, in the section {table.file}"
