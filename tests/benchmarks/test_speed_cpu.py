"""The CPU speed cases under pytest-benchmark: ``pytest --benchmark-only tests/benchmarks [--speed-shapes phi-4]``.

Each case is checked against float64 first. Caches are evicted before every round; extra_info has the bytes, the read
bandwidth of the same threads between the rounds, and the efficiency. The suite's own run interleaves the cases.
"""

from __future__ import annotations

import time

import numba
import numpy as np
import pytest
import torch

from kernels_numba.reference import Reference
from suite.speed import cpu
from suite.speed.cases import make_cases, needed_bytes
from suite.speed.timing import ReadBandwidth

ROUNDS = 10
METHODS = ["dense", "cats", "m-countdown", "given"]
SPARSITIES = [0.5, 0.7, 0.8, 0.9]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        shapes = metafunc.config.getoption("--speed-shapes", default="embedded,llama-3.1-8b").split(",")
        cases = []
        for level in ("layer", "op"):
            cases += make_cases(shapes, METHODS, SPARSITIES, level=level)
        cases.sort(key=lambda case: shapes.index(case.model_shape))  # layers of a shape are made once
        metafunc.parametrize("case", cases, ids=[case.label.replace(" ", "-") for case in cases])


@pytest.fixture(scope="module")
def layers_of():
    """Layers of the shape asked for last, their reference and an input that no layer is timed with."""
    made = {}

    def get(case):
        if case.model_shape not in made:
            made.clear()
            layers = [cpu.LayerData.random(case, 0, index) for index in range(cpu.layer_count(case))]
            first = layers[0]
            x = np.random.default_rng(1).standard_normal(case.d_model, dtype=np.float32)
            reference = Reference.of(first.w_gate, first.w_up, first.w_down_t, x, first.activation)
            made[case.model_shape] = layers, x, reference, ReadBandwidth(case.threads)
        return made[case.model_shape]

    return get


def test_layer(benchmark, case, layers_of):
    layers, x, reference, bandwidth = layers_of(case)
    threads = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with torch.inference_mode():
            bounds = [cpu.bind(case, layer) for layer in layers]
            found = cpu.check(case, bounds[0], layers[0], x, reference)
            assert not found.reason
            timed = cpu.on_all_layers(case, bounds, layers)
            bandwidth.samples.clear()

            def cold():
                bandwidth.evict()
                bandwidth.measure()
                time.sleep(0.01)  # workers of the other library stop spinning

            benchmark.group = f"{case.model_shape} {case.level}"
            benchmark.pedantic(timed.run, setup=cold, rounds=ROUNDS, warmup_rounds=1)
    finally:
        torch.set_num_threads(threads[0])
        numba.set_num_threads(threads[1])
    needed = needed_bytes(case, timed.realised)
    seconds = benchmark.stats.stats.median / timed.n_layers
    benchmark.extra_info.update(
        {
            "layers_per_round": timed.n_layers,
            "sparsity_realized": timed.realised,
            "bytes_read_mib": needed / 2**20,
            "read_bandwidth_gb_s": bandwidth.bytes_per_s / 1e9,
            "efficiency": needed / (seconds * bandwidth.bytes_per_s),
            "max_rel_error": found.error,
        }
    )
