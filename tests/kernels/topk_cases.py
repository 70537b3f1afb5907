"""Top-k on Numba's simulator against sorting; run as a program with NUMBA_ENABLE_CUDASIM=1."""

from __future__ import annotations

import sys

import numpy as np
from numba import cuda

from kernels_numba.gpu.topk import THREADS, make_kernel


def expected(values: np.ndarray, k: int) -> np.ndarray:
    """Stable sort by score, NaN first, equal ones by index."""
    keep = np.zeros(values.shape, np.int8)
    for row, scores in enumerate(values):
        ranked = sorted(
            range(len(scores)), key=lambda i: (not np.isnan(scores[i]), -np.nan_to_num(scores[i], nan=0), i)
        )
        keep[row, ranked[:k]] = 1
    return keep


def check(values: np.ndarray, n_bytes: int) -> None:
    bits = values.astype(np.float32).view(np.int32)
    scores = (bits >> 16).astype(np.int16) if n_bytes == 2 else bits
    exact = (scores.astype(np.int32) << 16 if n_bytes == 2 else bits).view(np.float32)
    kernel = cuda.jit(make_kernel(n_bytes))
    for k in (1, 7, values.shape[1] - 1, values.shape[1]):
        keep = np.full(values.shape, 9, np.int8)
        kernel[len(values), THREADS](scores, keep, k)
        np.testing.assert_array_equal(keep, expected(exact, k))


if __name__ == "__main__":
    draw = np.random.default_rng(0)
    for n_bytes in (2, 4):
        check(draw.normal(size=(1, 40)), n_bytes)
        check(draw.integers(-2, 3, (1, 300)).astype(float), n_bytes)
        check(np.array([[np.nan, 1, -np.inf, np.inf, -0.0, 0.0, np.nan, -1e-42, 1e-42, -1]]), n_bytes)
    sys.stdout.write("ok\n")
