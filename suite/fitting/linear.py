"""Stacks of linear predictors, one a layer, with their gradients by hand: three products a step and no autograd graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from suite.errors import InputError

_TERNARY_SCALE = 0.02
_PART = 8192  # tokens whose labels are made at a time: 50 MB a layer for d_ff 1536


class Stack(Protocol):
    """Predictors of several layers; every tensor's first dimension is the layer."""

    @property
    def parameters(self) -> list[Tensor]:
        """Master weights, fp32, with their gradients in ``grad``."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n_layers, n_tokens, d_ff) of x (n_layers, n_tokens, d_model), in the dtype of x."""

    def backward(self, x: Tensor, gradient: Tensor) -> None:
        """Set the gradients from that of the logits of the last `forward`."""

    def matrices(self, index: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """What is stored of one layer: ``v`` and ``u``, or ``u`` and ``scale``, on the CPU."""


def _generator(seed: int, layer: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + layer)  # of a layer, whichever are trained together


class LowRank:
    """``logit = (x V) U^T``, V of shape (d_model, rank), U of shape (d_ff, rank).

    Parameters
    ----------
    v : Tensor, shape (n_layers, d_model, rank), fp32
    u : Tensor, shape (n_layers, d_ff, rank), fp32
    channel_rms : Tensor, shape (n_layers, d_model), fp32
        Root mean square of every channel of x. The master weight of V is ``channel_rms * V``: a step of Adam then moves
        the logits through every channel alike, although channels of x differ by two orders of magnitude.
    """

    def __init__(self, v: Tensor, u: Tensor, channel_rms: Tensor) -> None:
        self._rms = channel_rms[:, :, None]
        self.parameters = [(v * self._rms).contiguous(), u.clone(memory_format=torch.contiguous_format)]
        self._hidden = torch.empty(0)
        self._used: tuple[Tensor, Tensor] = (self._hidden, self._hidden)

    @classmethod
    def random(cls, layers: Sequence[int], channel_rms: Tensor, d_ff: int, rank: int, seed: int) -> LowRank:
        """Start with logits near 0: V of unit hidden size, U small."""
        d_model, device = channel_rms.shape[1], channel_rms.device
        v, u = [], []
        for layer in layers:
            generator = _generator(seed, layer)
            v.append(torch.randn(d_model, rank, generator=generator) / math.sqrt(d_model))
            u.append(torch.randn(d_ff, rank, generator=generator) * (0.1 / math.sqrt(rank)))
        return cls(torch.stack(v).to(device) / channel_rms[:, :, None], torch.stack(u).to(device), channel_rms)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, see `Stack`."""
        v, u = self._used = ((self.parameters[0] / self._rms).to(x.dtype), self.parameters[1].to(x.dtype))
        self._hidden = x @ v
        return self._hidden @ u.mT

    def backward(self, x: Tensor, gradient: Tensor) -> None:
        """Gradients of V (in its master form) and U."""
        v, u = self.parameters
        u.grad = (gradient.mT @ self._hidden).float()
        v.grad = (x.mT @ (gradient @ self._used[1])).float() / self._rms

    def matrices(self, index: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """``v`` and ``u`` of one layer."""
        v, u = self.parameters[0][index] / self._rms[index], self.parameters[1][index]
        return {"v": v.to(dtype).cpu().contiguous(), "u": u.to(dtype).cpu().contiguous()}


class Ternary:
    """``logit = scale * x T^T``, ``T = round(W / scale)`` in {-1, 0, 1}, ``scale = mean(abs(W))``, W of (d_ff, d_model).

    The gradient passes straight through the rounding: W gets that of ``scale * T``.

    Parameters
    ----------
    w : Tensor, shape (n_layers, d_ff, d_model), fp32
    """

    def __init__(self, w: Tensor) -> None:
        self.parameters = [w.clone(memory_format=torch.contiguous_format)]

    @classmethod
    def random(cls, layers: Sequence[int], channel_rms: Tensor, d_ff: int, seed: int) -> Ternary:
        """Start from normal noise."""
        shape = (d_ff, channel_rms.shape[1])
        return cls.given(torch.stack([torch.randn(shape, generator=_generator(seed, layer)) for layer in layers]))

    @classmethod
    def given(cls, u: Tensor) -> Ternary:
        """Start from matrices (n_layers, d_ff, d_model), brought to a scale of .02: 20 steps of Adam flip an entry."""
        return cls(u * (_TERNARY_SCALE / u.abs().mean((1, 2), keepdim=True).clamp(min=1e-12)))

    def _rounded(self) -> tuple[Tensor, Tensor]:
        w = self.parameters[0]
        scale = w.abs().mean((1, 2), keepdim=True).clamp(min=1e-12)
        return (w / scale).round().clamp(-1, 1), scale

    def forward(self, x: Tensor) -> Tensor:
        """Logits, see `Stack`."""
        matrix, scale = self._rounded()
        return x @ (matrix * scale).to(x.dtype).mT

    def backward(self, x: Tensor, gradient: Tensor) -> None:
        """Gradient of W."""
        self.parameters[0].grad = (gradient.mT @ x).float()

    def matrices(self, index: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """``u``, int8, and ``scale`` of one layer."""
        matrix, scale = self._rounded()
        return {"u": matrix[index].to(torch.int8).cpu().contiguous(), "scale": scale[index].flatten().cpu()}


def regression(x: Tensor, labels: Callable[[slice], Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Reduced-rank least-squares regression of labels on x: ``argmin |x V U^T - labels|`` over V and U of a rank.

    Parameters
    ----------
    x : Tensor, shape (n_layers, n_tokens, d_model)
    labels : callable
        Labels (n_layers, n_part, d_ff) of a slice of the tokens.

    Returns
    -------
    v, u : Tensor, shapes (n_layers, d_model, rank) and (n_layers, d_ff, rank), fp32
        With the Cholesky factor C of ``x^T x`` plus a thousandth of its mean diagonal, the best full matrix is
        ``C^-T (C^-1 x^T labels)``, and its best approximation as x sees it keeps the first singular vectors of the
        bracket (Izenman 1975).
    """
    n_layers, n_tokens, d_model = x.shape
    gram, cross = x.new_zeros(n_layers, d_model, d_model, dtype=torch.float32), None
    for start in range(0, n_tokens, _PART):
        part = slice(start, min(n_tokens, start + _PART))
        wide, target = x[:, part].float(), labels(part).float()
        gram += wide.mT @ wide
        cross = wide.mT @ target if cross is None else cross + wide.mT @ target
    if cross is None:
        raise InputError("no tokens to start a predictor from: give more calibration text")
    ridge = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None] * 1e-3
    factor = torch.linalg.cholesky(gram + torch.diag_embed(ridge.expand(-1, d_model)))
    whitened = torch.linalg.solve_triangular(factor, cross, upper=False)
    left = torch.linalg.eigh(whitened @ whitened.mT).eigenvectors[:, :, -rank:]
    v = torch.linalg.solve_triangular(factor.mT, left, upper=True)
    u = whitened.mT @ left
    size = (u.norm(dim=1, keepdim=True) / v.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(min=1e-12).sqrt()
    return v * size, u / size
