"""kill -9 at random moments, and several processes on one store: nothing lost, doubled or torn."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from suite.runs.run import Options, plan, run
from tests.runs.fakes import FakeWorker, FakeWorld
from tests.runs.kill_driver import CONFIG

ROOT = Path(__file__).parents[2]


def drive(*arguments: str) -> Any:
    command = [sys.executable, "-m", "tests.runs.kill_driver", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def tables(folder: Path) -> dict[str, Any]:
    with (folder / "accuracy.csv").open() as file:
        rows = [{k: v for k, v in row.items() if k != "elapsed_s"} for row in csv.DictReader(file)]
    names = ("samples.csv.gz", "sparsity.csv", "speed.csv")
    return {"accuracy": rows, **{name: (folder / name).read_bytes() for name in names}}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tables(run(CONFIG, FakeWorld(), FakeWorker(), Options(tmp_path_factory.mktemp("unbroken"))).folder)


def test_resumed_csvs_equal_an_unbroken_runs(tmp_path, unbroken):
    found = drive("kill", str(tmp_path), "30")
    assert found["killed"] >= 20
    assert found["codes"] == [0, 0, 0]
    assert (found["torn"], found["damaged"], found["leftovers"]) == (0, 0, [])
    assert found["computed_again"] == 0
    for number in range(3):
        (folder,) = tmp_path.glob(f"store{number}/runs/*")
        assert tables(folder) == unbroken


def test_several_processes_share_one_store(tmp_path, unbroken):
    found = drive("two", str(tmp_path))
    assert found["codes"] == [0, 0, 0]
    assert found["computed"] == sorted(plan(CONFIG, FakeWorld()).keys)
    (folder,) = tmp_path.glob("shared/runs/*")
    assert tables(folder) == unbroken
