"""What the CSVs of a run take from a cell's key, from its measurement, and how rows are sorted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from suite.devices import Device
from suite.errors import InputError
from suite.schema import SPEED
from tests.runs.fakes import FakeWorker, FakeWorld, matrix
from tests.runs.test_runner import go, rows

BLOCK = {"shapes": ["embedded"], "methods": ["dense", "cats"], "sparsities": [0.5], "threads": [1]}
TIMING = matrix(accuracy=[], models=[], speed=[BLOCK])


class Driven(FakeWorld):
    """A device that has a driver."""

    def speed_device(self, kind: str) -> Device:
        return Device(kind, "fake", "driver of the key")


def timed(tmp_path: Path, **measured: Any) -> list[dict[str, str]]:
    class Timer(FakeWorker):
        def time(self, cells, fits):
            return [row | measured for row in super().time(cells, fits)]

    return rows(go(tmp_path, Timer(), TIMING, Driven()).folder, "speed.csv")


def test_the_device_of_a_row_is_that_of_its_key(tmp_path):
    found = timed(tmp_path, device_name="as torch calls it", driver_version="")
    assert {(row["device_name"], row["driver_version"]) for row in found} == {("fake", "driver of the key")}


@pytest.mark.parametrize(("name", "value"), [("dtype", "float16"), ("threads", 2), ("sparsity_target", 0.25)])
def test_a_row_that_contradicts_its_key_is_refused(tmp_path, name, value):
    with pytest.raises(InputError, match=f"{name} {value!r} was measured"):
        timed(tmp_path, **{name: value})


def test_none_on_either_side_contradicts_nothing(tmp_path):
    found = timed(tmp_path, threads=None, rank=8)
    assert {(row["threads"], row["rank"], row["status"]) for row in found} == {("", "8", "ok")}


def test_rows_are_sorted_by_every_setting_before_the_hash_of_the_cell():
    settings = [
        {"context_tokens": 128, "predictor": "low-rank", "rank": 8, "cache": "cold"},
        {"context_tokens": 128, "predictor": "low-rank", "rank": 8, "cache": "warm"},
        {"context_tokens": 128, "predictor": "low-rank", "rank": 16, "cache": "cold"},
        {"context_tokens": 128, "predictor": "other", "rank": 8, "cache": "cold"},
        {"context_tokens": 1024, "predictor": "low-rank", "rank": 8, "cache": "cold"},
    ]
    ordered = [{"model": "m", "cell_id": f"{9 - i}", **one} for i, one in enumerate(settings)]
    assert SPEED.sorted(ordered[::-1]) == ordered
