"""Numba CPU kernels of the sparse gated MLP, fp32, one token: one parallel region each, no atomics, no barrier.

Every thread owns a contiguous chunk of neurons (or of the list of active ones), so it reads long contiguous rows, and
adds its neurons' columns of W_down to its own row of ``partial``; the rows are summed at the end in thread order, so a
result depends on the number of threads but never on their timing.

Loops run over slices from index 0: an index that could be negative costs the vectorisation (4 instead of 16 GB/s).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

# Sums may be reordered (vectorised) and fused; nothing here lets the compiler assume that there is no NaN or inf.
FLAGS = {"reassoc", "contract", "nsz"}

SILU, GELU_TANH = 0, 1


@njit(cache=True, fastmath=FLAGS)
def activate(g: np.float32, kind: int) -> np.float32:
    """``act(g)``; formulas as in ``reference.activate``."""
    if kind == SILU:
        return g / (np.float32(1.0) + math.exp(-g))
    inner = np.float32(math.sqrt(2.0 / math.pi)) * (g + np.float32(0.044715) * g * g * g)
    return np.float32(0.5) * g * (np.float32(1.0) + math.tanh(inner))


@njit(cache=True, fastmath=FLAGS)
def dot(row, x):  # type: ignore[no-untyped-def]
    """Dot product of two (n,) fp32 arrays; four vector accumulators after unrolling."""
    total = np.float32(0.0)
    for j in range(x.size):
        total += row[j] * x[j]
    return total


@njit(cache=True, fastmath=FLAGS)
def dot2(row0, row1, x):  # type: ignore[no-untyped-def]
    """Two dot products at once: two streams of loads read 21.8 GB/s with one thread where one stream reads 16.3."""
    total0, total1 = np.float32(0.0), np.float32(0.0)
    for j in range(x.size):
        total0 += row0[j] * x[j]
        total1 += row1[j] * x[j]
    return total0, total1


@njit(cache=True, fastmath=FLAGS)
def add_rows(y, values, indices, w_down_t):  # type: ignore[no-untyped-def]
    """``y += values[n] * w_down_t[indices[n]]`` over all n, four rows at a time (24.5 GB/s; two 21.8, one 16.1)."""
    n = indices.size
    fours = n - n % 4
    for i in range(0, fours, 4):
        v0, v1, v2, v3 = values[i], values[i + 1], values[i + 2], values[i + 3]
        row0, row1 = w_down_t[indices[i]], w_down_t[indices[i + 1]]
        row2, row3 = w_down_t[indices[i + 2]], w_down_t[indices[i + 3]]
        for j in range(y.size):
            y[j] += v0 * row0[j] + v1 * row1[j] + v2 * row2[j] + v3 * row3[j]
    for i in range(fours, n):
        v0, row0 = values[i], w_down_t[indices[i]]
        for j in range(y.size):
            y[j] += v0 * row0[j]


@njit(cache=True, fastmath=FLAGS)
def sum_partials(partial, y):  # type: ignore[no-untyped-def]
    """``y = partial.sum(0)``, in thread order."""
    y[:] = partial[0]
    for t in range(1, len(partial)):
        row = partial[t]
        for j in range(y.size):
            y[j] += row[j]


@njit(cache=True, fastmath=FLAGS)
def keep(value, neuron, threshold, gate_first, kind, indices, values, n):  # type: ignore[no-untyped-def]
    """Append a neuron to the list of n unless its score is below the threshold; returns the new length."""
    if gate_first:
        value = activate(value, kind)
    if abs(value) < threshold:  # NaN compares false, so it is kept and reaches the output
        return n
    indices[n] = neuron
    values[n] = value
    return n + 1


@njit(cache=True, fastmath=FLAGS)
def choose(first, x, threshold, gate_first, kind, indices, values, start):  # type: ignore[no-untyped-def]
    """List the neurons whose score, the magnitude of a row of ``first`` times x, reaches the threshold; returns how many."""
    n, rows = 0, len(first)
    for i in range(0, rows - 1, 2):
        score0, score1 = dot2(first[i], first[i + 1], x)
        n = keep(score0, start + i, threshold, gate_first, kind, indices, values, n)
        n = keep(score1, start + i + 1, threshold, gate_first, kind, indices, values, n)
    if rows % 2:
        n = keep(dot(first[rows - 1], x), start + rows - 1, threshold, gate_first, kind, indices, values, n)
    return n


@njit(cache=True)
def product(value, factor):  # type: ignore[no-untyped-def]
    """``abs(value) * factor`` without any of the flags: rounded as everywhere else."""
    return abs(value) * factor


@njit(cache=True, fastmath=FLAGS)
def choose_scaled(first, x, threshold, scale, gate_first, kind, indices, values, start):  # type: ignore[no-untyped-def]
    """As ``choose``, of magnitudes times ``scale``; all products first: a choice between them takes 28 % longer."""
    n, rows = 0, len(first)
    for i in range(0, rows - 1, 2):
        values[i], values[i + 1] = dot2(first[i], first[i + 1], x)
    if rows % 2:
        values[rows - 1] = dot(first[rows - 1], x)
    for i in range(rows):
        value = activate(values[i], kind) if gate_first else values[i]
        if not product(value, scale[i]) < threshold:
            indices[n] = start + i
            values[n] = value
            n += 1
    return n


@njit(cache=True, fastmath=FLAGS)
def scale_chunk(u, z, residual, activated, kind, scale):  # type: ignore[no-untyped-def]
    """One thread's factors ``sqrt(act(U z)^2 + residual)``; without the activation function unless ``activated``."""
    for i in range(len(u)):
        guess = dot(u[i], z)
        if activated:
            guess = activate(guess, kind)
        scale[i] = math.sqrt(guess * guess + residual[i])


@njit(cache=True, parallel=True, fastmath=FLAGS)
def low_rank_scale(v_t, u, residual, x, activated, kind, z, scale, threads):  # type: ignore[no-untyped-def]
    """Factor of each neuron by a low rank: ``z = V^T x`` first, whose rows the threads share, then ``scale``.

    Parameters
    ----------
    v_t, u : array, shape (rank, d_model) and (d_ff, rank), fp32
    residual, scale : array, shape (d_ff,), fp32
    x : array, shape (d_model,), fp32
    activated : bool
        Whether the gate is approximated, behind whose activation function the residual is.
    z : array, shape (rank,), fp32
    """
    rank, d_ff = len(v_t), len(u)
    for t in prange(threads):
        low, high = t * rank // threads, (t + 1) * rank // threads
        part, rows = z[low:high], v_t[low:high]
        for i in range(part.size):
            part[i] = dot(rows[i], x)
    for t in prange(threads):
        low, high = t * d_ff // threads, (t + 1) * d_ff // threads
        scale_chunk(u[low:high], z, residual[low:high], activated, kind, scale[low:high])


@njit(cache=True, fastmath=FLAGS)
def threshold_chunk(first, second, w_down_t, x, threshold, scale, gate_first, kind, indices, values, y, start):  # type: ignore[no-untyped-def]
    """One thread's neurons: dense rows of ``first``, then for those kept a row of ``second`` and one of ``w_down_t``.

    ``scale``, ``indices`` and ``values`` are this thread's slices, ``start`` its first neuron. Returns how many it kept.
    """
    if scale is None:
        n = choose(first, x, threshold, gate_first, kind, indices, values, start)
    else:
        n = choose_scaled(first, x, threshold, scale, gate_first, kind, indices, values, start)
    for i in range(0, n - 1, 2):
        other0, other1 = dot2(second[indices[i]], second[indices[i + 1]], x)
        values[i] *= other0 if gate_first else activate(other0, kind)
        values[i + 1] *= other1 if gate_first else activate(other1, kind)
    if n % 2:
        other0 = dot(second[indices[n - 1]], x)
        values[n - 1] *= other0 if gate_first else activate(other0, kind)
    y[:] = np.float32(0.0)
    add_rows(y, values[:n], indices[:n], w_down_t)
    return n


@njit(cache=True, parallel=True, fastmath=FLAGS)
def threshold_layer(  # type: ignore[no-untyped-def]
    first, second, w_down_t, x, y, threshold, scale, gate_first, kind, indices, values, partial, counts
):
    """Layer with a threshold on the first projection; leaves the active neurons, ascending, in ``indices[:count]``.

    Parameters
    ----------
    first, second, w_down_t : array, shape (d_ff, d_model), fp32
        The projection computed densely, the one computed sparsely, and the transposed down projection.
    x, y : array, shape (d_model,), fp32
    threshold : float32
    scale : array, shape (d_ff,), fp32, or None
        Factor of each neuron in its score; None compiles to a kernel without one.
    gate_first : bool
        Whether ``first`` is W_gate (CATS) or W_up (M-COUNTDOWN).
    kind : int
        SILU or GELU_TANH.
    indices, values : array, shape (d_ff,), int32 and fp32
    partial : array, shape (n_threads, d_model), fp32
    counts : array, shape (n_threads,), int64

    Returns
    -------
    int
        Active neurons.
    """
    threads = len(partial)
    d_ff = len(first)
    for t in prange(threads):
        low, high = t * d_ff // threads, (t + 1) * d_ff // threads
        counts[t] = threshold_chunk(
            first[low:high],
            second,
            w_down_t,
            x,
            threshold,
            None if scale is None else scale[low:high],
            gate_first,
            kind,
            indices[low:high],
            values[low:high],
            partial[t],
            low,
        )
    sum_partials(partial, y)
    total = counts[0]
    for t in range(1, threads):
        low = t * d_ff // threads
        for i in range(counts[t]):
            indices[total + i] = indices[low + i]
        total += counts[t]
    return total


@njit(cache=True, fastmath=FLAGS)
def given_chunk(w_gate, w_up, w_down_t, x, kind, indices, values, y):  # type: ignore[no-untyped-def]
    """One thread's part of the given list: rows of gate and up, then of ``w_down_t``."""
    for i in range(indices.size):
        row = indices[i]
        gate, up = dot2(w_gate[row], w_up[row], x)
        values[i] = activate(gate, kind) * up
    y[:] = np.float32(0.0)
    add_rows(y, values, indices, w_down_t)


@njit(cache=True, parallel=True, fastmath=FLAGS)
def given_layer(w_gate, w_up, w_down_t, x, y, kind, indices, values, partial):  # type: ignore[no-untyped-def]
    """Layer for a given list of active neurons ``indices`` (n_active,); other arguments as in ``threshold_layer``."""
    threads = len(partial)
    n = indices.size
    for t in prange(threads):
        low, high = t * n // threads, (t + 1) * n // threads
        given_chunk(w_gate, w_up, w_down_t, x, kind, indices[low:high], values[low:high], partial[t])
    sum_partials(partial, y)


@njit(cache=True, parallel=True, fastmath=FLAGS)
def down_proj(values, indices, w_down_t, y, partial):  # type: ignore[no-untyped-def]
    """Sparse down projection ``y = sum_n values[n] * w_down_t[indices[n]]``."""
    threads = len(partial)
    n = indices.size
    for t in prange(threads):
        low, high = t * n // threads, (t + 1) * n // threads
        partial[t, :] = np.float32(0.0)
        add_rows(partial[t], values[low:high], indices[low:high], w_down_t)
    sum_partials(partial, y)


@njit(cache=True)
def out_of_range(indices, limit):  # type: ignore[no-untyped-def]
    """Whether an index is negative or not below ``limit``."""
    wrong = 0
    for i in range(indices.size):
        wrong += (indices[i] < 0) | (indices[i] >= limit)
    return wrong > 0


@njit(cache=True)
def repeated(indices, limit):  # type: ignore[no-untyped-def]
    """An index in [0, limit) that is listed more than once, -1 if none is; an ascending list needs no memory."""
    unordered = 0
    for i in range(1, indices.size):
        unordered += indices[i - 1] >= indices[i]
    if unordered == 0:
        return -1
    seen = np.zeros(limit, dtype=np.uint8)
    for i in range(indices.size):
        if seen[indices[i]]:
            return indices[i]
        seen[indices[i]] = 1
    return -1


_RUN = 16384  # elements a stream reads at a time


@njit(cache=True, fastmath=FLAGS)
def _sum(part):  # type: ignore[no-untyped-def]
    """Sum read as four streams: 25.9 GB/s with one thread where one stream reads 21.0, so the ceiling is no lower."""
    total0, total1, total2, total3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
    whole = part.size - part.size % (4 * _RUN)
    for i in range(0, whole, 4 * _RUN):
        run0, run1 = part[i : i + _RUN], part[i + _RUN : i + 2 * _RUN]
        run2, run3 = part[i + 2 * _RUN : i + 3 * _RUN], part[i + 3 * _RUN : i + 4 * _RUN]
        for j in range(_RUN):
            total0 += run0[j]
            total1 += run1[j]
            total2 += run2[j]
            total3 += run3[j]
    for value in part[whole:]:
        total0 += value
    return total0 + total1 + total2 + total3


@njit(cache=True, parallel=True, fastmath=FLAGS)
def read_all(buffer, sums):  # type: ignore[no-untyped-def]
    """Read ``buffer`` (n,) fp32 once, a contiguous part a thread: what bandwidth is measured with."""
    threads = len(sums)
    n = buffer.size
    for t in prange(threads):
        sums[t] = _sum(buffer[t * n // threads : (t + 1) * n // threads])
