"""Gated MLP in numpy float64, the truth every kernel is compared with, and the error a right kernel may have.

    g = W_gate x      a = act(g)      u = W_up x      v = a * u      y = W_down v = sum_i v_i W_down[:, i]

Weights are widened block by block, so the memory needed stays small whatever the shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

ActivationName = Literal["silu", "gelu_tanh"]
Projection = Literal["gate", "up"]
Float64 = NDArray[np.float64]

ACTIVATIONS: tuple[ActivationName, ...] = ("silu", "gelu_tanh")

# Rounding unit (half an ulp at 1) of what the kernel stores; all of them accumulate in fp32.
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_BLOCK = 1 << 21  # weights widened at a time: 16 MiB of float64


def activate(g: Float64, activation: str) -> Float64:
    """``act(g)`` in float64: ``silu`` is g / (1 + exp(-g)), ``gelu_tanh`` the tanh form of GELU (Gemma)."""
    with np.errstate(over="ignore", invalid="ignore"):
        if activation == "silu":
            return g / (1.0 + np.exp(-g))
        if activation == "gelu_tanh":
            return 0.5 * g * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (g + 0.044715 * g**3)))
    raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")


def project(w: NDArray[np.floating], x: NDArray[np.floating]) -> Float64:
    """``W x`` in float64.

    Parameters
    ----------
    w : array, shape (n_rows, n_columns), any float dtype
    x : array, shape (n_columns,), any float dtype

    Returns
    -------
    array, shape (n_rows,), float64
    """
    rows = max(1, _BLOCK // max(1, w.shape[1]))
    x64 = x.astype(np.float64)
    blocks = [w[i : i + rows].astype(np.float64) @ x64 for i in range(0, len(w), rows)]
    return np.concatenate(blocks) if blocks else np.zeros(0)


def combine(values: NDArray[np.floating], indices: NDArray[np.integer], w_down_t: NDArray[np.floating]) -> Float64:
    """Sparse down projection ``y = sum_n values[n] * W_down[:, indices[n]]`` in float64.

    Parameters
    ----------
    values : array, shape (n_active,)
    indices : array, shape (n_active,), integer
    w_down_t : array, shape (d_ff, d_model), ``W_down`` transposed

    Returns
    -------
    array, shape (d_model,), float64
    """
    y = np.zeros(w_down_t.shape[1])
    rows = max(1, _BLOCK // max(1, w_down_t.shape[1]))
    for i in range(0, len(indices), rows):
        y += values[i : i + rows].astype(np.float64) @ w_down_t[indices[i : i + rows]].astype(np.float64)
    return y


@dataclass(frozen=True)
class Reference:
    """Float64 activations of one layer for one token; every method's output follows from them.

    Parameters
    ----------
    gate, act, up : array, shape (d_ff,), float64
        ``g``, ``act(g)`` and ``u``.
    w_down_t : array, shape (d_ff, d_model)
        ``W_down`` transposed, as stored.
    d_model : int
    """

    gate: Float64
    act: Float64
    up: Float64
    w_down_t: NDArray[np.floating]

    @classmethod
    def of(
        cls,
        w_gate: NDArray[np.floating],
        w_up: NDArray[np.floating],
        w_down_t: NDArray[np.floating],
        x: NDArray[np.floating],
        activation: str,
    ) -> Reference:
        """Project ``x`` (d_model,) with ``w_gate`` and ``w_up`` (d_ff, d_model)."""
        gate = project(w_gate, x)
        return cls(gate, activate(gate, activation), project(w_up, x), w_down_t)

    def scores(self, first: Projection) -> Float64:
        """What a threshold is set on: ``abs(u)`` if the first projection is up (M-COUNTDOWN), ``abs(a)`` if gate (CATS)."""
        return np.abs(self.up if first == "up" else self.act)

    def active(self, first: Projection, threshold: float) -> NDArray[np.int64]:
        """Neurons kept by a threshold, ascending: all but those with ``score < threshold``, so NaN is kept."""
        return np.flatnonzero(~(self.scores(first) < threshold))

    def output(self, active: NDArray[np.integer] | None = None) -> Float64:
        """``y`` (d_model,) of the given active set; None is the dense layer."""
        indices = np.arange(len(self.up)) if active is None else np.asarray(active)
        return combine((self.act * self.up)[indices], indices, self.w_down_t)


def error_bound(d_model: int, n_active: int, dtype: str = "float32") -> float:
    """Largest error a right kernel may have, relative to ``max(abs(y))``.

    Rounding errors of a sum of n terms of random sign grow like ``u sqrt(n)`` relative to the sum's own size: two dot
    products of length d_model make v, one sum of n_active terms makes y, both accumulated in fp32. 4 standard deviations
    cover the largest of some thousand outputs. An output stored narrower than fp32 adds its own rounding once.

    Leaving out one neuron of n_active changes y by about ``1 / (4 sqrt(n_active))`` of its maximum, which is 2e-3 for
    14336 neurons, far above the bound of 8e-5 in fp32.
    """
    accumulate = UNIT_ROUNDOFF["float32"]
    store = UNIT_ROUNDOFF[dtype] if dtype != "float32" else 0.0
    return 4.0 * accumulate * (math.sqrt(2.0 * d_model) + math.sqrt(max(1, n_active)) + 2.0) + 2.0 * store


def relative_error(y: NDArray[np.floating], reference: Float64) -> float:
    """``max(abs(y - reference)) / max(abs(reference))``; inf where one is NaN or infinite and the other is not."""
    y64 = y.astype(np.float64)
    if len(reference) == 0:
        return 0.0
    finite = np.isfinite(reference)
    if not np.array_equal(np.where(finite, 0.0, reference), np.where(np.isfinite(y64), 0.0, y64), equal_nan=True):
        return math.inf
    if not finite.any():
        return 0.0
    scale = float(np.abs(reference[finite]).max())
    error = float(np.abs(y64[finite] - reference[finite]).max())
    return error / scale if scale > 0 else (0.0 if error == 0 else math.inf)


def wrongly_selected(
    reference_scores: Float64, active: NDArray[np.integer], threshold: float, d_model: int
) -> NDArray[np.int64]:
    """Neurons that a kernel kept or dropped against the reference although their score is clear of the threshold.

    Scores within the rounding error of a dot product of length d_model, ``4 u sqrt(d_model) max(score)``, or within 4 ulp
    of the threshold may fall on either side.
    """
    kept = np.zeros(len(reference_scores), dtype=bool)
    kept[np.asarray(active)] = True
    expected = ~(reference_scores < threshold)
    finite = reference_scores[np.isfinite(reference_scores)]
    largest = float(finite.max()) if len(finite) else 0.0
    band = UNIT_ROUNDOFF["float32"] * max(
        4.0 * math.sqrt(d_model) * largest, 8.0 * abs(threshold) if math.isfinite(threshold) else 0.0
    )
    with np.errstate(invalid="ignore"):
        close = np.abs(reference_scores - threshold) <= band
    return np.flatnonzero((kept != expected) & ~close)
