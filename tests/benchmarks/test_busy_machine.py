"""What one busy process beside costs a CPU layer: ``pytest --benchmark-only tests/benchmarks/test_busy_machine.py``.

extra_info has the ratio of the medians, busy over quiet; nothing is asserted, as it depends on what else the machine does.
"""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np

from kernels_numba import cpu
from suite.settings import openmp_waiting

SHAPE = 576, 1536  # SmolLM2-135M: short layers suffer most


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_busy_over_quiet(benchmark):
    rng = np.random.default_rng(0)
    d_model, d_ff = SHAPE
    weights = [rng.standard_normal((d_ff, d_model), dtype=np.float32) for _ in range(3)]
    layer = cpu.ThresholdLayer(*weights, activation="silu", first="up", threshold=40.0)
    x, out = rng.standard_normal(d_model, dtype=np.float32), np.empty(d_model, np.float32)
    layer(x, out)
    quiet = np.median([seconds(lambda: layer(x, out)) for _ in range(200)])
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            time.sleep(0.5)
            benchmark.pedantic(lambda: layer(x, out), rounds=200)
        finally:
            other.kill()
    busy = benchmark.stats.stats.median
    benchmark.extra_info.update(
        {"quiet_s": quiet, "busy_over_quiet": busy / quiet, "OMP_WAIT_POLICY": openmp_waiting()}
    )
