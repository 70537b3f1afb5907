"""The CPU speed cases under pytest-benchmark: ``pytest --benchmark-only tests/benchmarks [--speed-shapes phi-4]``.

Each case is checked against float64 first. Caches are evicted before every round; extra_info has the bytes, the read
bandwidth of the same threads between the rounds, and the efficiency. The suite's own run interleaves the cases.
"""

from __future__ import annotations

import time

import pytest

from suite.speed.expand import make_cases
from suite.speed.layer_cpu import CpuRig
from tests.benchmarks.rigs import Rigs, timed_facts

ROUNDS = 10
METHODS = ["dense", "cats", "m-countdown", "given"]
SPARSITIES = [0.5, 0.7, 0.8, 0.9]


def speed_cases(config):
    shapes = config.getoption("--speed-shapes", default="embedded,llama-3.1-8b").split(",")
    cases = [case for level in ("layer", "op") for case in make_cases(shapes, METHODS, SPARSITIES, level=level)]
    return sorted(cases, key=lambda case: shapes.index(case.model_shape))  # layers of a shape are made once


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = speed_cases(metafunc.config)
        metafunc.parametrize("case", cases, ids=[case.label.replace(" ", "-") for case in cases])


@pytest.fixture(scope="module")
def rigs(request):
    made = Rigs(CpuRig, speed_cases(request.config))
    yield made
    made.close()


def test_layer(benchmark, case, rigs):
    rig, bandwidth = rigs(case)
    subject = rig.subject(case)
    check = subject.check()
    assert not check.reason
    subject.prepare()

    def cold():
        bandwidth.measure()
        time.sleep(0.01)  # workers of the other library stop spinning

    benchmark.group = f"{case.model_shape} {case.level}"
    benchmark.pedantic(subject.run, setup=cold, rounds=ROUNDS, warmup_rounds=1)
    seconds = benchmark.stats.stats.median / len(rig.layers)
    benchmark.extra_info.update(
        {"layers_per_round": len(rig.layers), **timed_facts(subject, check, seconds, bandwidth)}
    )
