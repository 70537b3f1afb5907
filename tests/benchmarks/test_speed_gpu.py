"""The CUDA speed cases under pytest-benchmark: ``pytest --benchmark-only tests/benchmarks/test_speed_gpu.py``.

The timed function replays a graph of all layers, whose weights are distinct and over twice the L2 cache, and waits for
it: the wall clock holds one launch and one synchronisation more (about 20 us a round) than the suite's own events.
Each case is checked against float64 first.
"""

from __future__ import annotations

import pytest
import torch

from suite.speed.cases import make_cases, needed_bytes

METHODS = ["dense", "cats", "m-countdown", "d-countdown", "given"]
SPARSITIES = [0.5, 0.7, 0.8, 0.9]
ROUNDS = 50


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        asked = metafunc.config.getoption("--speed-shapes", default="llama-3.1-8b").split(",")
        shapes = [shape for shape in asked if shape != "embedded"]  # that one lies in L2
        cases = []
        for level in ("layer", "op"):
            cases += make_cases(
                shapes, METHODS, SPARSITIES, level=level, dtypes=["bfloat16"], backends=["torch", "numba-cuda"],
                clocks=["graph"],
            )  # fmt: skip
        cases = [case for case in cases if case.device == "cuda"]
        cases.sort(key=lambda case: shapes.index(case.model_shape))
        metafunc.parametrize("case", cases, ids=[case.label.replace(" ", "-") for case in cases])


@pytest.fixture(scope="module")
def layers_of():
    """Layers of the shape asked for last, and the read bandwidth beside them."""
    made = {}

    def get(case):
        from suite.speed import gpu
        from suite.speed.gpu_timing import ReadBandwidth

        if case.model_shape not in made:
            made.clear()
            layers = [gpu.LayerData.random(case, 512, 0, index) for index in range(12)]
            bandwidth = ReadBandwidth()
            bandwidth.measure(10)
            made[case.model_shape] = layers, bandwidth
        return made[case.model_shape]

    return get


def test_layer(benchmark, case, layers_of):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from suite.speed import gpu
    from suite.speed.gpu_timing import prepare

    with torch.inference_mode():
        layers, bandwidth = layers_of(case)
        bounds = [gpu.bind(case, layer) for layer in layers]
        found = gpu.check(case, bounds[0], layers[0], 0)
        assert not found.reason
        timed = prepare(case, bounds, layers, found.realised)

        def replay():
            timed.run()
            torch.cuda.synchronize()

        benchmark.group = f"{case.model_shape} {case.level}"
        benchmark.pedantic(replay, rounds=ROUNDS, warmup_rounds=3)
    needed = needed_bytes(case, found.realised)
    seconds = benchmark.stats.stats.median / len(layers)
    benchmark.extra_info.update(
        {
            "layers_per_round": len(layers),
            "sparsity_realized": found.realised,
            "bytes_read_mib": needed / 2**20,
            "read_bandwidth_gb_s": bandwidth.bytes_per_s / 1e9,
            "efficiency": needed / (seconds * bandwidth.bytes_per_s),
            "launch_us": timed.launch_us,
            "max_rel_error": found.error,
        }
    )
