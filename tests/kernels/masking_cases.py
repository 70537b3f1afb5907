"""What the masking kernel drops, on Numba's simulator, against sorting; run as a program with NUMBA_ENABLE_CUDASIM=1."""

from __future__ import annotations

import sys

import numpy as np
from numba import cuda

from kernels_numba.gpu.masking import MaskPlan, make_kernel, threshold_key
from kernels_numba.gpu.ptx import simulated_vectors, simulator

INFINITE = 0x7F80  # of bf16


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Stable sort by score, NaN first, equal ones by index."""
    keep = np.zeros(len(scores), bool)
    ranked = sorted(range(len(scores)), key=lambda i: (not np.isnan(scores[i]), -np.nan_to_num(scores[i], nan=0), i))
    keep[ranked[:k]] = True
    return keep


def stored(values: np.ndarray, n_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores as integers of ``n_bytes``, and the fp32 that they stand for."""
    bits = values.astype(np.float32).view(np.int32)
    scores = (bits >> 16).astype(np.int16) if n_bytes == 2 else bits
    return scores, (scores.astype(np.int32) << 16 if n_bytes == 2 else bits).view(np.float32)


def check(
    values: np.ndarray,
    n_bytes: int,
    *,
    k: int = 0,
    threshold: float = -np.inf,
    gathered: bool = False,
    some: bool = False,
) -> None:
    """One launch: what is left of values that are all 1 but for an infinite one in token 0, and both counts."""
    scores, exact = stored(values, n_bytes)
    n, width = scores.shape
    rows = np.arange(n)[::-1].copy() if gathered else np.arange(n) + 1
    flags = (np.arange(n) % 2 == 0 if some else np.ones(n)).astype(np.uint8)
    left = np.ones((n + 1, width), np.int16)
    left[rows[0], width - 1] = INFINITE
    counts = np.zeros(3, np.int64)
    keep = np.array([top_k(row, k) if k else ~(row < np.float32(threshold)) for row in exact]) | (flags == 0)[:, None]
    wanted = left.copy()
    wanted[rows] *= keep
    kernel = cuda.jit(make_kernel(MaskPlan(n_bytes, 2, INFINITE, gathered, some, warps=1), simulated_vectors))
    with simulator.allowed(counts, shared_bytes=16):
        arguments = scores.ravel(), left.ravel(), rows, flags, counts.ctypes.data
        kernel[n, 32](*arguments, 1, n, width, k, threshold_key(threshold))
    np.testing.assert_array_equal(left, wanted)
    alive = flags == 1
    assert counts[0] == keep[alive].sum()
    assert counts[2] == alive.sum()
    assert counts[1] == (np.isnan(exact).any(1) & alive)[1:].sum()  # not token 0, whose NaN its infinity explains


if __name__ == "__main__":
    draw = np.random.default_rng(0)
    special = np.array([[np.nan, 1, -np.inf, np.inf, -0.0, 0.0, np.nan, -1e-42, 1e-42, -1]])
    special = np.concatenate([special, special[:, ::-1], np.zeros_like(special)])
    for n_bytes in (2, 4):
        plain, ties = draw.normal(size=(1, 40)), draw.integers(-2, 3, (1, 300)).astype(float)
        check(plain, n_bytes, k=7)
        check(plain, n_bytes, k=40)
        check(ties, n_bytes, k=130)
        check(special, n_bytes, k=2, gathered=True)
        check(special, n_bytes, k=5, some=True)
        for threshold in (-np.inf, 0.0, 1e-42, np.inf):
            check(special, n_bytes, threshold=threshold, gathered=threshold < 0, some=threshold > 0)
        check(ties, n_bytes, threshold=1.0)
    sys.stdout.write("ok\n")
