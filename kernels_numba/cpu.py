"""Sparse gated MLP layers on the CPU: torch tensors or numpy arrays in fp32, computed in place of the dense layer.

    layer = ThresholdLayer(w_gate, w_up, transpose_down(w_down), activation="silu", first="up", threshold=0.8)
    y = layer(x)             # x (..., d_model); layer.count neurons were used

Weights are bound without a copy. Kernels run on the threads given (default: all of numba's), are compiled on first use
and cached on disk. NaN in x gives NaN in y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from kernels_numba import cpu_kernels
from kernels_numba.checks import check_apart, checked_threshold
from kernels_numba.reference import ACTIVATIONS, LowRank

Array = TypeVar("Array", torch.Tensor, NDArray[Any])
AnyArray = torch.Tensor | NDArray[Any]


_FLOAT32 = (np.dtype(np.float32),)
_INTEGERS = (np.dtype(np.int32), np.dtype(np.int64))


def _view(
    name: str,
    value: AnyArray,
    shape: tuple[int | None, ...],
    dtypes: tuple[np.dtype[Any], ...] = _FLOAT32,
    *,
    strided: bool = False,
) -> NDArray[Any]:
    """Numpy view of a C-contiguous (unless ``strided``) CPU tensor or array, checked against a shape (None is any length).

    Runs several times a token, so what is right passes with few comparisons (1 us instead of 10).
    """
    if isinstance(value, np.ndarray):
        array = value
        found = str(array.dtype) if array.dtype not in dtypes else ""
    elif isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"{name} is on {value.device}: the CPU kernels need it on the cpu")
        found = "" if value.dtype in _TORCH_DTYPES[dtypes] else str(value.dtype).removeprefix("torch.")
    else:
        raise ValueError(f"{name} is a {type(value).__name__}: pass a torch tensor or a numpy array")
    if found:
        raise ValueError(f"{name} has dtype {found}: convert it to {' or '.join(d.name for d in dtypes)}")
    if isinstance(value, torch.Tensor):
        array = value.detach().numpy()
    if array.shape != shape and (
        array.ndim != len(shape) or any(w not in (None, n) for w, n in zip(shape, array.shape, strict=True))
    ):
        wanted = ", ".join("n" if w is None else str(w) for w in shape)
        raise ValueError(f"{name} has shape {array.shape}: expected ({wanted})")
    if not (strided or array.flags.c_contiguous):
        layout = "column-major" if array.flags.f_contiguous else f"strided {array.strides}"
        raise ValueError(
            f"{name} is {layout}, not contiguous: call contiguous() on it (numpy: np.ascontiguousarray) once, before binding"
        )
    return array


def _result(out: AnyArray, shape: tuple[int, ...], source: NDArray[Any], **weights: NDArray[Any]) -> NDArray[Any]:
    """View of ``out``, which may be the input itself but must not overlap it otherwise, nor any weight."""
    target = _view("out", out, shape)
    if not target.flags.writeable:
        raise ValueError("out is read-only: pass an array that can be written, or none")
    if np.may_share_memory(target, source):  # rare, and addresses cost a microsecond
        check_apart((target.ctypes.data, target.nbytes), (source.ctypes.data, source.nbytes), "the input")
    for name, weight in weights.items():
        if np.may_share_memory(target, weight):
            raise ValueError(f"out overlaps {name}: it would overwrite the weights; pass memory of its own")
    return target


_TORCH_DTYPES = {_FLOAT32: (torch.float32,), _INTEGERS: (torch.int32, torch.int64)}


def _threads(threads: int | None) -> int:
    limit = numba.config.NUMBA_NUM_THREADS
    if threads is None:
        return limit
    if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= limit:
        raise ValueError(f"threads={threads!r}: must be 1 to {limit} (NUMBA_NUM_THREADS)")
    return threads


def transpose_down(w_down: Array) -> Array:
    """Contiguous transposed copy of ``w_down`` (d_model, d_ff), fp32: one neuron's column becomes a row to read at once.

    Made through numpy, which asks for huge pages where torch does not.
    """
    source = _view("w_down", w_down, (None, None), strided=True)
    copy = np.empty(source.shape[::-1], dtype=np.float32)
    torch.from_numpy(copy).copy_(torch.from_numpy(source).t())  # on torch's threads
    return torch.from_numpy(copy) if isinstance(w_down, torch.Tensor) else copy


class _Layer:
    """Bound weights and workspaces of one gated MLP."""

    def __init__(
        self, w_gate: AnyArray, w_up: AnyArray, w_down_t: AnyArray, *, activation: str, threads: int | None
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        self.w_gate = _view("w_gate", w_gate, (None, None))
        self.d_ff, self.d_model = self.w_gate.shape
        if not (self.d_ff and self.d_model):
            raise ValueError(f"w_gate has shape {self.w_gate.shape}: both sizes must be at least 1")
        self.w_up = _view("w_up", w_up, (self.d_ff, self.d_model))
        self.w_down_t = _view("w_down_t", w_down_t, (self.d_ff, self.d_model))
        self.activation = activation
        self.threads = _threads(threads)
        self.count = 0
        self._kind = ACTIVATIONS.index(activation)  # order of cpu_kernels.SILU, GELU_TANH
        self._values = np.zeros(self.d_ff, dtype=np.float32)
        self._partial = np.zeros((self.threads, self.d_model), dtype=np.float32)

    @property
    def extra_bytes(self) -> int:
        """Memory beyond the dense layer's: the transposed ``W_down`` and the workspaces."""
        return self.w_down_t.nbytes + self._values.nbytes + self._partial.nbytes

    def _rows(
        self, x: AnyArray, out: AnyArray | None
    ) -> tuple[Sequence[NDArray[Any]], Sequence[NDArray[Any]], AnyArray]:
        """Tokens of ``x`` and of ``out`` as 1-d views, and ``out`` itself, made if None."""
        shape = tuple(x.shape)
        if not shape or shape[-1] != self.d_model:
            raise ValueError(f"x has shape {shape}: its last dimension must be d_model={self.d_model}")
        source = _view("x", x, shape)
        if out is None:
            out = torch.empty(shape) if isinstance(x, torch.Tensor) else np.empty(shape, dtype=np.float32)
            target = _view("out", out, shape)
        else:
            target = _result(out, shape, source, w_gate=self.w_gate, w_up=self.w_up, w_down_t=self.w_down_t)
        if len(shape) == 1:
            return (source,), (target,), out
        return list(source.reshape(-1, self.d_model)), list(target.reshape(-1, self.d_model)), out


class _Approximation:
    """Bound matrices of a low rank."""

    def __init__(self, low_rank: LowRank, d_model: int, d_ff: int) -> None:
        v = _view("v of low_rank", low_rank.v, (d_model, None), strided=True)
        if not 1 <= v.shape[1] <= d_model:
            raise ValueError(f"v of low_rank has rank {v.shape[1]}: must be 1 to d_model={d_model}")
        self._v_t = np.ascontiguousarray(v.T)
        self._u = _view("u of low_rank", low_rank.u, (d_ff, v.shape[1]))
        self._residual = _view("residual of low_rank", low_rank.residual, (d_ff,))
        self._z = np.zeros(v.shape[1], dtype=np.float32)

    @property
    def nbytes(self) -> int:
        return self._v_t.nbytes + self._u.nbytes + self._residual.nbytes + self._z.nbytes

    def fill(self, scale: NDArray[Any], x: NDArray[Any], activated: bool, kind: int, threads: int) -> None:
        """Factors of a token; ``activated`` where the gate is approximated."""
        cpu_kernels.low_rank_scale(self._v_t, self._u, self._residual, x, activated, kind, self._z, scale, threads)


class ThresholdLayer(_Layer):
    """Gated MLP that computes one projection densely and uses the neurons whose score is not below a threshold.

    M-COUNTDOWN: ``first="up"``, score ``abs(u)``. CATS: ``first="gate"``, score ``abs(act(g))``. Rows of the other
    projection and columns of ``W_down`` are read for the active neurons only.

    Parameters
    ----------
    w_gate, w_up : Tensor or array, shape (d_ff, d_model), fp32, contiguous
    w_down_t : same, shape (d_ff, d_model)
        From `transpose_down`; may be shared by several layers.
    activation : "silu" or "gelu_tanh"
    first : "up" or "gate"
    threshold : float
        A neuron is kept unless its score is below it; -inf keeps all.
    scale : Tensor or array, shape (d_ff,), fp32, optional
        Factor of each neuron in its score: ``abs(u_i) * scale_i`` or ``abs(act(g_i)) * scale_i``, an fp32 product.
    low_rank : LowRank of fp32 tensors, optional, in place of ``scale``
        Of the other projection: makes the factors of each token, ``sqrt(act(U V^T x)^2 + residual)``, with ``first="gate"``
        ``sqrt((U V^T x)^2 + residual)``. V is kept transposed, a copy.
    threads : int, optional
        Default: all of numba's.

    Attributes
    ----------
    count : int
        Active neurons of the last call, summed over its tokens.

    Raises
    ------
    ValueError
        Wrong dtype, device, shape, contiguity or name, a threshold that is NaN or not a number, or both kinds of factors.
    """

    def __init__(
        self,
        w_gate: AnyArray,
        w_up: AnyArray,
        w_down_t: AnyArray,
        *,
        activation: str,
        first: str,
        threshold: float,
        scale: AnyArray | None = None,
        low_rank: LowRank | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(w_gate, w_up, w_down_t, activation=activation, threads=threads)
        if first not in ("up", "gate"):
            raise ValueError(f"first={first!r}: must be 'up' (M-COUNTDOWN) or 'gate' (CATS)")
        self.first = first
        self.threshold = threshold
        if scale is not None and low_rank is not None:
            raise ValueError("scale and low_rank were given: both are the factors of the neurons, pass one")
        self.scale = None if scale is None else _view("scale", scale, (self.d_ff,))
        self._low_rank = None if low_rank is None else _Approximation(low_rank, self.d_model, self.d_ff)
        if self._low_rank is not None:
            self.scale = np.zeros(self.d_ff, dtype=np.float32)  # of the token under way
        self._indices = np.zeros(self.d_ff, dtype=np.int32)
        self._counts = np.zeros(self.threads, dtype=np.int64)
        self._last = 0

    @property
    def threshold(self) -> float:
        """Neurons scoring below it are skipped; compared in fp32."""
        return float(self._threshold)

    @threshold.setter
    def threshold(self, value: float) -> None:
        with np.errstate(over="ignore"):  # beyond fp32 is inf, as every score beyond it
            self._threshold = np.float32(checked_threshold(value))

    @property
    def active(self) -> NDArray[np.int32]:
        """Active neurons of the last token, ascending, shape (n_active,); valid until the next call."""
        return self._indices[: self._last]

    @property
    def extra_bytes(self) -> int:
        """Memory beyond the dense layer's: the transposed ``W_down``, the factors or what makes them, and the workspaces."""
        factors = 0 if self.scale is None else self.scale.nbytes
        factors += 0 if self._low_rank is None else self._low_rank.nbytes
        return super().extra_bytes + self._indices.nbytes + self._counts.nbytes + factors

    def __call__(self, x: Array, out: Array | None = None, *, seen: Array | None = None) -> Array:
        """``y`` of the shape and kind of ``x`` (..., d_model), fp32; token by token, each with its own active set.

        ``seen``, shape of x, is what the low rank reads, where that is not x itself.
        """
        rows, targets, result = self._rows(x, out)
        read = rows if seen is None else _view("seen", seen, tuple(x.shape)).reshape(-1, self.d_model)
        gate_first = self.first == "gate"
        first, second = (self.w_gate, self.w_up) if gate_first else (self.w_up, self.w_gate)
        numba.set_num_threads(self.threads)
        self.count = 0
        for row, target, reads in zip(rows, targets, read, strict=True):
            if self._low_rank is not None and self.scale is not None:
                self._low_rank.fill(self.scale, reads, not gate_first, self._kind, self.threads)
            self._last = cpu_kernels.threshold_layer(
                first,
                second,
                self.w_down_t,
                row,
                target,
                self._threshold,
                self.scale,
                gate_first,
                self._kind,
                self._indices,
                self._values,
                self._partial,
                self._counts,
            )
            self.count += self._last
        return result  # type: ignore[return-value]


class GivenLayer(_Layer):
    """Gated MLP over a given set of active neurons: what a method with a predictor runs after predicting.

    Parameters as `ThresholdLayer`, without a threshold. ``count`` is the size of the last set.
    """

    def __init__(
        self, w_gate: AnyArray, w_up: AnyArray, w_down_t: AnyArray, *, activation: str, threads: int | None = None
    ) -> None:
        super().__init__(w_gate, w_up, w_down_t, activation=activation, threads=threads)

    def __call__(self, x: Array, active: AnyArray, out: Array | None = None) -> Array:
        """``y`` for one token.

        Parameters
        ----------
        x : shape (..., d_model) holding one token, fp32
        active : shape (n_active,), int32 or int64, each neuron at most once; ascending order reads fastest
        out : shape of x, optional

        Raises
        ------
        ValueError
            As the constructor, more than one token, an index out of range or one given twice.
        """
        rows, targets, result = self._rows(x, out)
        if len(rows) != 1:
            raise ValueError(f"x holds {len(rows)} tokens: a given active set belongs to one")
        indices = _indices(active, self.d_ff)
        numba.set_num_threads(self.threads)
        cpu_kernels.given_layer(
            self.w_gate, self.w_up, self.w_down_t, rows[0], targets[0], self._kind, indices, self._values, self._partial
        )
        self.count = len(indices)
        return result  # type: ignore[return-value]


def _indices(active: AnyArray, d_ff: int, name: str = "active") -> NDArray[Any]:
    indices = _view(name, active, (None,), _INTEGERS)
    if len(indices) > d_ff:
        raise ValueError(f"{name} has {len(indices)} entries: at most d_ff={d_ff}, each neuron once")
    if cpu_kernels.out_of_range(indices, d_ff):
        raise ValueError(f"{name} has indices from {indices.min()} to {indices.max()}: must be in [0, {d_ff})")
    twice = cpu_kernels.repeated(indices, d_ff)
    if twice >= 0:
        raise ValueError(f"{name} holds {twice} more than once: each neuron once, else it would count twice")
    return indices


def sparse_down_proj(
    values: Array,
    indices: AnyArray,
    count: int,
    w_down_t: AnyArray,
    out: Array | None = None,
    *,
    threads: int | None = None,
) -> Array:
    """Sparse down projection: ``y = sum_{n < count} values[n] * W_down[:, indices[n]]``.

    Parameters
    ----------
    values : Tensor or array, shape (>= count,), fp32
    indices : Tensor or array, shape (>= count,), int32 or int64
    count : int
        Active neurons; entries beyond it are not read.
    w_down_t : Tensor or array, shape (d_ff, d_model), fp32
        From `transpose_down`.
    out : shape (d_model,), fp32, optional
    threads : int, optional
        Default: all of numba's.

    Returns
    -------
    Tensor or array, shape (d_model,), fp32, of the kind of ``values``

    Raises
    ------
    ValueError
        Wrong dtype, device, shape or contiguity, count or index out of range, an index given twice.
    """
    weights = _view("w_down_t", w_down_t, (None, None))
    v = _view("values", values, (None,))
    listed = _view("indices", indices, (None,), _INTEGERS)
    if not isinstance(count, int | np.integer) or isinstance(count, bool) or not 0 <= count <= min(len(v), len(listed)):
        raise ValueError(f"count={count!r}: must be 0 to {min(len(v), len(listed))}, the entries of values and indices")
    used = _indices(listed[:count], len(weights), "indices")
    d_model = weights.shape[1]
    if out is None:
        out = torch.empty(d_model) if isinstance(values, torch.Tensor) else np.empty(d_model, dtype=np.float32)
    target = _result(out, (d_model,), v, w_down_t=weights)
    n_threads = _threads(threads)
    numba.set_num_threads(n_threads)
    cpu_kernels.down_proj(v[:count], used, weights, target, np.empty((n_threads, d_model), dtype=np.float32))
    return out
