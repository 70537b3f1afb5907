"""A time whose rounds lie far apart is said to be disturbed, whatever it was timed on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from suite.speed import decode_time, gpu_timing, timing
from suite.speed.cases import make_cases

BANDWIDTH = 1e10
QUIET = [1.0e-3, 1.1e-3, 1.2e-3, 1.3e-3, 1.4e-3]  # quartiles 1.1 and 1.3 ms
BUSY = [1.0e-3, 1.0e-3, 1.2e-3, 1.51e-3, 8.0e-3]  # 1.0 and 1.51 ms


def cpu_row(samples):
    case = make_cases(["llama-3.1-8b"], ["dense"], [0.0], threads=[1])[0]
    entry = timing.Timed(case, lambda: None, 1, 0.0, samples)
    return timing.timed_row(entry, SimpleNamespace(bytes_per_s=BANDWIDTH))


def gpu_row(samples):
    case = make_cases(["llama-3.1-8b"], ["dense"], [0.0], threads=[1])[0]
    return gpu_timing.numbers_of(gpu_timing.Timed(case, lambda: None, 0.0, [], None, 1.0, samples), BANDWIDTH)


@pytest.mark.parametrize("row_of", [cpu_row, gpu_row, decode_time.times])
def test_rounds_that_lie_far_apart_are_marked_and_stay_ok(row_of):
    quiet, busy = row_of(QUIET), row_of(BUSY)
    assert (quiet["status"], quiet["reason"]) == ("ok", "")
    assert (busy["status"], busy["reason"]) == ("ok", timing.DISTURBED)
    assert "1.5x" in timing.DISTURBED
    for row in (quiet, busy):
        assert (row["rounds"], row["latency_us_median"]) == (5, pytest.approx(1200.0))
        assert row["latency_us_min"] == pytest.approx(1000.0)
    assert (busy["latency_us_q25"], busy["latency_us_q75"]) == (pytest.approx(1000.0), pytest.approx(1510.0))


@pytest.mark.parametrize("row_of", [cpu_row, gpu_row])
def test_efficiency_is_of_the_median(row_of):
    row = row_of(BUSY)
    assert row["efficiency"] == pytest.approx(row["bytes_read_mib"] * 2**20 / (1.2e-3 * BANDWIDTH))
    assert decode_time.times(BUSY)["tokens_per_s"] == pytest.approx(1 / 1.2e-3)
