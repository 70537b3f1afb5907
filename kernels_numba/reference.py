"""Gated MLP in numpy float64, the truth every kernel is compared with, and the error a right kernel may have.

    g = W_gate x      a = act(g)      u = W_up x      v = a * u      y = W_down v = sum_i v_i W_down[:, i]

Weights are widened block by block, so the memory needed stays small whatever the shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

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
class LowRank:
    """A projection approximated by a low rank, ``W ~ U V^T``, and what that misses of it.

    Parameters
    ----------
    v : Tensor, shape (d_model, rank), the weights' dtype
    u : Tensor, shape (d_ff, rank), the weights' dtype
    residual : Tensor, shape (d_ff,), fp32
        Expected square of the error of ``act(g)`` where it is the gate's, of ``u`` where it is up's.
    """

    v: Tensor
    u: Tensor
    residual: Tensor


@dataclass(frozen=True)
class Gated:
    """A gated predictor: what the square of a product of projections is expected to be, from a low rank of each.

    Parameters
    ----------
    gate, up : LowRank or None
        At least one; their ranks may differ. A weight of each neuron in the square is the caller's to put into one of them: its
        root into U, itself into the residual.
    act : bool
        The gate counts behind the activation function, and so does its residual.
    """

    gate: LowRank | None
    up: LowRank | None
    act: bool = True

    def logits(self, x: Tensor, activation: str) -> Tensor:
        """``sqrt((act(g^)^2 + residual) * (u^^2 + residual))``, what the threshold is set on.

        Parameters
        ----------
        x : Tensor, shape (n_tokens, d_model), fp32 or fp64
            All is computed in its dtype.
        activation : "silu" or "gelu_tanh"

        Returns
        -------
        Tensor, shape (n_tokens, d_ff)
        """
        from torch.nn.functional import gelu, silu

        square = x.new_ones(())
        for part, acts in ((self.gate, self.act), (self.up, False)):
            if part is not None:
                guess = (x @ part.v.to(x.dtype)) @ part.u.to(x.dtype).T
                if acts:
                    guess = silu(guess) if activation == "silu" else gelu(guess, approximate="tanh")
                square = square * (guess.square() + part.residual)
        return square.sqrt()


def low_rank_scale(low_rank: LowRank, x: NDArray[np.floating], activation: str | None) -> Float64:
    """Factor of each neuron in a score, ``sqrt(act(U V^T x)^2 + residual)`` in float64.

    Parameters
    ----------
    x : array, shape (d_model,)
        What the approximation reads.
    activation : of the model where the gate is approximated; None for up

    Returns
    -------
    array, shape (d_ff,), float64
    """
    v, u, residual = (part.double().cpu().numpy() for part in (low_rank.v, low_rank.u, low_rank.residual))
    guess = u @ (x.astype(np.float64) @ v)
    if activation is not None:
        guess = activate(guess, activation)
    found: Float64 = np.sqrt(np.square(guess) + residual)
    return found


@dataclass(frozen=True)
class Reference:
    """Float64 activations of one layer for one token; every method's output follows from them.

    Parameters
    ----------
    gate, act, up : array, shape (d_ff,), float64
        ``g``, ``act(g)`` and ``u``.
    w_down_t : array, shape (d_ff, d_model)
        ``W_down`` transposed, as stored.
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

    def active(
        self, first: Projection, threshold: float, scale: NDArray[np.floating] | None = None
    ) -> NDArray[np.int64]:
        """Neurons kept by a threshold, ascending: all but those with ``score < threshold``, so NaN is kept.

        ``scale`` (d_ff,): factor of each neuron in its score.
        """
        scores = self.scores(first) if scale is None else self.scores(first) * scale
        return np.flatnonzero(~(scores < threshold))

    def output(self, active: NDArray[np.integer] | None = None) -> Float64:
        """``y`` (d_model,) of the given active set; None is the dense layer."""
        indices = np.arange(len(self.up)) if active is None else np.asarray(active)
        return combine((self.act * self.up)[indices], indices, self.w_down_t)

    def error_bound(
        self, y: Float64, d_model: int, active: NDArray[np.integer] | None = None, dtype: str = "float32"
    ) -> float:
        """`error_bound` of ``y = output(active)``; the errors of ``v`` are those of two dot products of length d_model.

        A dot product that cancels is no more exact than the others of its projection, so its error is ``u sqrt(d_model)``
        times the root mean square of all of them; act' is at most 1.13.
        """
        indices = np.arange(len(self.up)) if active is None else np.asarray(active)
        rms_gate, rms_up = (float(np.sqrt(np.square(z).mean())) for z in (self.gate, self.up))
        act, up = np.abs(self.act[indices]), np.abs(self.up[indices])
        spread = UNIT_ROUNDOFF["float32"] * (math.sqrt(d_model) + 4.0) * (1.13 * rms_gate * up + rms_up * act)
        return error_bound(y, (self.act * self.up)[indices], indices, self.w_down_t, value_errors=spread, dtype=dtype)


def error_bound(
    y: Float64,
    values: NDArray[np.floating],
    indices: NDArray[np.integer],
    w_down_t: NDArray[np.floating],
    *,
    value_errors: Float64 | None = None,
    dtype: str = "float32",
) -> float:
    """Largest error a right kernel may have in ``y = combine(values, indices, w_down_t)``, relative to ``max(abs(y))``.

    The rounding errors of an fp32 sum of n terms grow like ``u sqrt(n)`` times the size that the sum has without
    cancellation, ``norm(values) * rms(w)``; errors of the values themselves (``value_errors``, (n_active,), one standard
    deviation) add up at random. 4 standard deviations cover the largest of some thousand outputs. An output stored
    narrower than fp32 adds its own rounding. 0 without active neurons.

    Leaving out one neuron of n changes y by about ``1 / (4 sqrt(n))`` of its maximum: 2e-3 for the 14336 neurons of a
    Llama layer, whose bound is below 1e-4.
    """
    n = len(indices)
    largest = float(np.abs(y).max(initial=0.0))
    if n == 0 or not 0 < largest < math.inf:
        return 0.0
    norm = float(np.linalg.norm(values.astype(np.float64)))
    errors = 0.0 if value_errors is None else float(np.linalg.norm(value_errors))
    sample = w_down_t[indices[:: max(1, n // 512)]].astype(np.float64)
    weight = float(np.sqrt(np.square(sample).mean()))
    accumulated = UNIT_ROUNDOFF["float32"] * (math.sqrt(n) + 4.0) * max(norm * weight, largest)
    stored = 2.0 * UNIT_ROUNDOFF[dtype] if dtype != "float32" else 0.0
    return 4.0 * (accumulated + errors * weight) / largest + stored


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
    reference_scores: Float64,
    active: NDArray[np.integer],
    threshold: float,
    d_model: int,
    scale: NDArray[np.floating] | None = None,
    rank: int = 0,
) -> NDArray[np.int64]:
    """Neurons that a kernel kept or dropped against the reference although their score is clear of the threshold.

    Scores within the rounding error of a dot product of length d_model, ``4 u sqrt(d_model) max(score)``, or within 4 ulp
    of the threshold may fall on either side. With factors of the neurons, ``scale`` (d_ff,), a score is the given one
    times the factor, and so is its error. Factors made by a low rank of ``rank``, here in float64, have errors of their own
    in the kernel: those of sums of d_model and of rank terms.
    """
    kept = np.zeros(len(reference_scores), dtype=bool)
    kept[np.asarray(active)] = True
    factor = np.ones(1) if scale is None else scale.astype(np.float64)
    finite = reference_scores[np.isfinite(reference_scores)]
    largest = float(finite.max()) if len(finite) else 0.0
    sums = 4.0 * math.sqrt(d_model) * largest * factor
    if rank:  # of act(g^), whose slope is at most 1.13, so that the largest factor is as large as what is summed
        error = 4.0 * 1.13 * (math.sqrt(d_model) + math.sqrt(rank)) * float(np.nanmax(factor))
        sums = sums + error * np.nan_to_num(reference_scores)
    band = UNIT_ROUNDOFF["float32"] * np.maximum(sums, 8.0 * abs(threshold) if math.isfinite(threshold) else 0.0)
    with np.errstate(invalid="ignore"):
        scores = reference_scores * factor
        close = np.abs(scores - threshold) <= band
    expected = ~(scores < threshold)
    return np.flatnonzero((kept != expected) & ~close)
