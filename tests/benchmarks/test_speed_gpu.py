"""The CUDA speed cases under pytest-benchmark: ``pytest --benchmark-only tests/benchmarks/test_speed_gpu.py``.

The timed function replays a graph of all layers, whose weights are distinct and over twice the L2 cache, and waits for
it: the wall clock holds one launch and one synchronisation more (about 20 us a round) than the suite's own events.
Each case is checked against float64 first.
"""

from __future__ import annotations

import pytest
import torch

from suite.speed.expand import make_cases
from tests.benchmarks.rigs import Rigs, timed_facts

METHODS = ["dense", "cats", "m-countdown", "d-countdown", "given"]
SPARSITIES = [0.5, 0.7, 0.8, 0.9]
ROUNDS = 50


def speed_cases(config):
    asked = config.getoption("--speed-shapes", default="llama-3.1-8b").split(",")
    shapes = [shape for shape in asked if shape != "embedded"]  # that one lies in L2
    options = {"dtypes": ["bfloat16"], "backends": ["torch", "numba-cuda"], "clocks": ["graph"]}
    cases = [
        case for level in ("layer", "op") for case in make_cases(shapes, METHODS, SPARSITIES, level=level, **options)
    ]
    return sorted(cases, key=lambda case: shapes.index(case.model_shape))


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = speed_cases(metafunc.config)
        metafunc.parametrize("case", cases, ids=[case.label.replace(" ", "-") for case in cases])


@pytest.fixture(scope="module")
def rigs(request):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from suite.speed.layer_cuda import CudaRig

    made = Rigs(CudaRig, speed_cases(request.config))
    yield made
    made.close()


def test_layer(benchmark, case, rigs):
    rig, bandwidth = rigs(case)
    bandwidth.measure()
    subject = rig.subject(case)
    check = subject.check()
    assert not check.reason
    subject.prepare()

    def replay():
        subject.run()
        torch.cuda.synchronize()

    benchmark.group = f"{case.model_shape} {case.level}"
    benchmark.pedantic(replay, rounds=ROUNDS, warmup_rounds=3)
    seconds = benchmark.stats.stats.median / len(rig.layers)
    benchmark.extra_info.update(
        {"layers_per_round": len(rig.layers), **timed_facts(subject, check, seconds, bandwidth)}
    )
