"""A result has a time exactly if its check passed, and a time whose rounds lie far apart is said to be disturbed."""

from __future__ import annotations

import numpy as np
import pytest

from suite.errors import InputError
from suite.registry import METHODS
from suite.speed.bench import default_methods
from suite.speed.case import DISTURBED, GIVEN, Kernel, Result, kernel_of, microseconds
from suite.speed.expand import make_cases

QUIET = [1.0e-3, 1.1e-3, 1.2e-3, 1.3e-3, 1.4e-3]  # quartiles 1.1 and 1.3 ms
BUSY = [1.0e-3, 1.0e-3, 1.2e-3, 1.51e-3, 8.0e-3]  # 1.0 and 1.51 ms


@pytest.fixture
def case():
    return make_cases(["llama-3.1-8b"], ["dense"], [0.0], threads=[1])[0]


@pytest.mark.parametrize("check", ["failed", "skipped"])
@pytest.mark.parametrize("more", [{"latencies_us": QUIET}, {"facts": {"efficiency": 0.9}}, {"facts": {"phases": [{}]}}])
def test_a_time_without_a_passed_check_cannot_be_built(case, check, more):
    with pytest.raises(ValueError, match="although its check was " + check):
        Result(case, check, "it is wrong", **more)


def test_a_passed_check_has_a_time_and_any_other_a_reason(case):
    with pytest.raises(ValueError, match="it has no time"):
        Result(case, "passed")
    with pytest.raises(ValueError, match="without a reason"):
        Result(case, "failed")
    assert (
        Result(case, "failed", "wrong", {"max_rel_error": 0.5, "efficiency": None}).row()["latency_us_median"] is None
    )


def test_rounds_that_lie_far_apart_are_marked_and_stay_ok(case):
    quiet, busy = (Result(case, "passed", latencies_us=microseconds(seconds)).row() for seconds in (QUIET, BUSY))
    assert (quiet["status"], quiet["reason"]) == ("ok", "")
    assert (busy["status"], busy["reason"]) == ("ok", DISTURBED)
    assert "1.5x" in DISTURBED
    for row in (quiet, busy):
        assert (row["rounds"], row["latency_us_median"]) == (5, pytest.approx(1200.0))
        assert row["latency_us_min"] == pytest.approx(1000.0)
    assert (busy["latency_us_q25"], busy["latency_us_q75"]) == (pytest.approx(1000.0), pytest.approx(1510.0))


def test_columns_follow_from_the_timings_as_they_are_stored(case):
    seconds = list(np.random.default_rng(0).uniform(1e-3, 2e-3, 50))
    row = Result(case, "passed", latencies_us=microseconds(seconds)).row()
    assert row["timings"] == pytest.approx([1e6 * s for s in seconds], rel=5e-6)
    assert all(len(f"{value:.10g}".replace(".", "")) <= 6 for value in row["timings"])
    assert row["latency_us_median"] == np.median(row["timings"])
    assert row["latency_us_q75"] == np.percentile(row["timings"], 75)


def test_the_contract_of_a_method_decides_its_kernel():
    third = "tests.contract.third_party:PowerOfUp"
    found = {
        name: kernel_of(name)
        for name in ("dense", "cats", "dejavu", "s-countdown", "md-countdown", "griffin", GIVEN, third)
    }
    assert found == {
        "dense": Kernel.DENSE,
        "cats": Kernel.THRESHOLD,
        "dejavu": Kernel.PREDICTOR,
        "s-countdown": Kernel.PREDICTOR,
        "md-countdown": Kernel.THRESHOLD,
        "griffin": Kernel.GATHERED,
        GIVEN: Kernel.GIVEN,
        third: Kernel.THRESHOLD,
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random", "method 'random' has no practical mode: leave it out of the speed cases"),
        ("tests.speed.own_methods:Unkerneled", "has neither one first projection nor a predictor: no kernel runs it"),
        ("tests.modeling.site_methods:Teal", "masks mlp.input and mlp.neurons: the kernels skip neurons alone"),
        ("giver", "unknown speed method 'giver'; did you mean 'given'"),
    ],
)
def test_what_no_kernel_runs_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        kernel_of(name)


def test_a_registered_method_that_no_kernel_runs_is_not_timed_by_default(monkeypatch):
    before = default_methods()
    monkeypatch.setitem(METHODS, "teal", "tests.modeling.site_methods:Teal")
    assert default_methods() == before
