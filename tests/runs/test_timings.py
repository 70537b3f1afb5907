"""Rounds of timed cases: written into the run folder, held against speed.csv, and tested between two runs."""

import gzip
import random
import shutil

import pytest

from suite.runs.audit.compare import compare
from suite.runs.audit.verify import verify_files
from suite.runs.run import Options, run
from suite.runs.view.manifest import seal
from suite.runs.view.read import timings_of
from suite.speed.case import time_columns
from tests.runs.fakes import FakeWorker, FakeWorld, matrix
from tests.runs.test_audit import SPEED, change

TIMING = matrix(accuracy=[], models=[], speed=[SPEED])


class Timer(FakeWorker):
    """Fifty rounds of a case, around a time that is ``factor`` times the same."""

    factor = 1.0

    def time(self, cells, fits):
        found = []
        for cell, row in zip(cells, super().time(cells, fits), strict=True):
            draw = random.Random(cell.key + str(self.factor))
            latencies = [float(f"{100 * self.factor * draw.gauss(1, 0.01):.6g}") for _ in range(50)]
            found.append(row | time_columns(latencies) | {"timings": latencies})
        return found


def make(folder, factor=1.0):
    timer = Timer()
    timer.factor = factor
    made = run(TIMING, FakeWorld(), timer, Options(folder)).folder
    seal(made)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("a"))


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def test_rounds_are_kept_and_quartiles_follow_from_them(whole, tmp_path):
    found = timings_of(whole)
    assert [len(latencies) for latencies in found.values()] == [50, 50]
    assert verify_files(whole) == []
    raw = (whole / "timings.csv.gz").read_bytes()
    assert raw[4:8] == bytes(4)  # no time of the compression
    assert gzip.decompress(raw).decode().splitlines()[0] == "cell_id,round,latency_us"
    assert (make(tmp_path) / "timings.csv.gz").read_bytes() == raw


def test_a_round_that_was_changed_is_found(folder):
    change(folder, "timings.csv.gz", lambda table: [row.update(latency_us="50") for row in table[:30]])
    problems = [line for line in verify_files(folder) if line.startswith("speed.csv line")]
    assert [line.split(":")[1].split()[0] for line in problems] == [
        "latency_us_median", "latency_us_q25", "latency_us_q75", "latency_us_min",
    ]  # fmt: skip


def test_rounds_of_a_case_without_a_time_are_found(folder):
    change(folder, "speed.csv", lambda table: table[0].update(status="failed"))
    assert any("has no time in speed.csv" in line for line in verify_files(folder))


def test_compare_tests_the_rounds(whole, tmp_path):
    def lines(factor):
        found = compare(whole, make(tmp_path / str(factor), factor))
        return [line for line in found if "timings of B" in line]

    assert lines(1.05) == ["  timings of B: 0 faster, 2 slower, 0 no difference, 0 untested"]
    assert lines(0.95) == ["  timings of B: 2 faster, 0 slower, 0 no difference, 0 untested"]
    assert lines(1.0) == ["  timings of B: 0 faster, 0 slower, 2 no difference, 0 untested"]


def test_a_run_without_rounds_compares_as_untested(whole, folder):
    change(folder, "speed.csv", lambda table: [row.update(latency_us_median="7.25") for row in table])
    (folder / "timings.csv.gz").unlink()
    lines = compare(whole, folder)
    assert "  timings of B: 0 faster, 0 slower, 0 no difference, 2 untested" in lines
    assert sum(line.endswith(" -> 7.25, untested") for line in lines) == 2


def test_rounds_of_an_earlier_writing_are_removed(tmp_path):
    made = make(tmp_path)
    assert (made / "timings.csv.gz").exists()
    run(TIMING, FakeWorld(), FakeWorker(), Options(tmp_path, rerun="all"))
    seal(made)
    assert not (made / "timings.csv.gz").exists()
    assert verify_files(made) == []
