"""The op `sparse_down_proj`: the sparse down projection alone, with the device code of the layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels_numba.checks import check_apart
from kernels_numba.gpu.host.checks import NAMES, check_list, check_range
from kernels_numba.gpu.host.layers import Layer, extent
from kernels_numba.gpu.mlp.plan import Kind


class DownProjection(Layer):
    """The op `sparse_down_proj` with its weight bound once: for decode loops and graphs."""

    kind: Kind = "down"

    def __init__(self, w_down_t: Tensor, *, checked: bool = False) -> None:
        super().__init__(w_down_t, "silu")
        self.checked = checked
        self._options["value_dtype"] = NAMES[self.dtype]

    def __call__(
        self,
        values: Tensor,
        indices: Tensor,
        count: Tensor,
        out: Tensor | None = None,
        *,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``y = sum_{n < count} values[..., n] * W_down[:, indices[n]]``, shape (d_model,) or (batch, d_model)."""
        check_list("indices", indices, self.device)
        check_list("count", count, self.device, one=True)
        if values.dtype != self.dtype or values.device != self.device or not values.is_contiguous():
            raise ValueError(f"values must be contiguous, {self.dtype} on {self.device}, as w_down_t")
        if values.dim() not in (1, 2) or values.shape[-1] != len(indices):
            raise ValueError(f"values have shape {tuple(values.shape)}: expected (..., {len(indices)}), as indices")
        if self.checked:
            check_range(indices, count, self.d_ff)
        shape = (*values.shape[:-1], self.d_model)
        if out is None:
            out = torch.empty(shape, dtype=self.dtype, device=self.device)
        n_tokens = self._tokens("out", out, shape)
        if residual is not None:
            self._tokens("residual", residual, shape)
            check_apart(extent(out), extent(residual), "residual")
        check_apart(extent(out), extent(values), "values")
        lists = {"indices": indices.data_ptr(), "count": count.data_ptr(), "value_stride": values.shape[-1]}
        for begin in range(0, n_tokens, self._most):
            part = slice(begin, begin + self._most)
            rows, whole = values.reshape(n_tokens, -1)[part], out.reshape(n_tokens, -1)[part]
            extra = residual.reshape(n_tokens, -1)[part] if residual is not None else None
            self._go(len(rows), 0, whole, extra, lists | {"values": rows.data_ptr()})
        return out


def sparse_down_proj(
    values: Tensor,
    indices: Tensor,
    count: Tensor,
    w_down_t: Tensor,
    out: Tensor | None = None,
    *,
    checked: bool = False,
) -> Tensor:
    """Sparse down projection ``y = sum_{n < count} values[n] * W_down[:, indices[n]]``.

    Parameters
    ----------
    values : Tensor, shape (capacity,) or (batch, capacity), dtype of ``w_down_t``
    indices : Tensor, shape (capacity,), int32
        Each in [0, d_ff): looked at only if ``checked`` (which waits for the device).
    count : Tensor, one element, int32
        Active neurons, on the device; more than d_ff counts as d_ff, less than 0 as 0.
    w_down_t : Tensor, shape (d_ff, d_model)
        From `transpose_down`.
    out : Tensor, shape (d_model,) or (batch, d_model), optional

    Returns
    -------
    Tensor
        fp32 sums, rounded to the dtype of ``w_down_t``.

    Raises
    ------
    ValueError
        Wrong dtype, device, shape or contiguity; with ``checked`` also a count or an index out of range, or an index given twice.
    """
    key = (w_down_t.data_ptr(), tuple(w_down_t.shape), w_down_t.dtype, checked)
    if key not in _BOUND:
        _BOUND.clear()  # one weight at a time: loops bind a DownProjection
        _BOUND[key] = DownProjection(w_down_t, checked=checked)
    return _BOUND[key](values, indices, count, out)


_BOUND: dict[tuple[Any, ...], DownProjection] = {}
