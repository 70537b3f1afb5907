"""Every committed run verifies from its files alone."""

from pathlib import Path

import pytest

from suite.cli import main

REFERENCE = Path(__file__).parents[2] / "results" / "reference"


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in REFERENCE.glob("*/manifest.json")), ids=lambda f: f.name
)
def test_committed_run_verifies(folder, capsys):
    assert main(["verify", str(folder)]) == 0, capsys.readouterr().err
