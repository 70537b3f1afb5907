"""The method contract: a method scores neurons; selection, masking, counting and fitting are done once, here and outside."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from suite.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["none", "ideal", "practical"]
Projection = Literal["gate", "up"]


@dataclass(frozen=True)
class Activations:
    """Activations of one gated MLP for the tokens in scope.

    Notation of the paper: ``g = W_gate x``, ``a = act(g)``, ``u = W_up x``, ``v = a * u``, ``y = W_down v``.

    Parameters
    ----------
    gate, act, up : Tensor, shape (n_tokens, d_ff), the model's dtype
        ``g``, ``a`` and ``u``.
    down_norms : callable
        Makes `down_norm2`, once, if a method asks for it.
    layer : int
        Index of the layer, from 0.
    documents, positions : Tensor, shape (n_tokens,), int64
        Which document and which position in it each token is; noise is keyed by them so that batching cannot change it.
    """

    gate: Tensor
    act: Tensor
    up: Tensor
    down_norms: Callable[[], Tensor]
    layer: int
    documents: Tensor
    positions: Tensor

    @cached_property
    def product(self) -> Tensor:
        """``v = act(g) * u``, shape (n_tokens, d_ff), in the model's dtype."""
        return self.act * self.up

    @property
    def down_norm2(self) -> Tensor:
        """Squared L2 norms of the columns of ``W_down``, shape (d_ff,), fp32."""
        return self.down_norms()


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A sparsification method of a gated MLP; its fields are its parameters.

    Class attributes
    ----------------
    name : registry name.
    modes : modes that exist for it (``none`` for methods without a ranking).
    first_projection : the projection computed densely before ranking (what a threshold is set on), or None.
    needs_predictor : True if the practical mode needs a trained predictor of the kept set.
    """

    sparsity: float = 0.0

    name: ClassVar[str]
    modes: ClassVar[tuple[Mode, ...]] = ("ideal", "practical")
    first_projection: ClassVar[Projection | None] = None
    needs_predictor: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, (int, float)) or isinstance(self.sparsity, bool) or not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity {self.sparsity!r} of method {self.name}: must be a number in [0, 1)")

    @abstractmethod
    def score(self, activations: Activations) -> Tensor:
        """Rank of every neuron, larger is kept: shape (n_tokens, d_ff), any float dtype (compared in fp32)."""

    def parameters(self) -> dict[str, Any]:
        """Fields by name: what identifies this method in a cell's key."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def kept_count(d_ff: int, sparsity: float) -> int:
    """Neurons kept: ``k = d_ff - floor(sparsity * d_ff)``, at least 1; exact for decimal sparsities such as .29."""
    return max(1, d_ff - math.floor(Fraction(str(sparsity)) * d_ff))


def select_top_k(score: Tensor, k: int) -> Tensor:
    """Exactly k neurons a token: all above the kth value, then those equal to it, lowest index first.

    Parameters
    ----------
    score : Tensor, shape (n_tokens, d_ff), any float dtype
        Compared in fp32. NaN ranks above everything, so that it reaches the output.
    k : int, 1 <= k <= d_ff

    Returns
    -------
    Tensor, shape (n_tokens, d_ff), bool
    """
    import numpy as np  # late: listing the methods must load neither
    import torch

    d_ff = score.shape[-1]
    if not 1 <= k <= d_ff:
        raise InputError(f"cannot keep k={k} of d_ff={d_ff} neurons")
    if k == d_ff:
        return torch.ones_like(score, dtype=torch.bool)
    score = score.detach()
    if score.device.type == "cuda" and (kernel := _cuda_top_k()) is not None:
        return kernel(score if score.dtype == torch.bfloat16 else score.float(), k)
    score = score.float()
    if score.device.type != "cpu":  # looking for ties first would make the host wait for the device
        return _break_ties(score, torch.topk(score, k, dim=-1, sorted=True).values[:, -1:], k)
    # numpy's vectorised partition takes 1.6 ms for 512 x 1536 scores, torch.topk 4.4 to 10
    kth = torch.from_numpy(np.partition(score.numpy(), d_ff - k, axis=-1)[:, d_ff - k, None])
    keep = ~(score < kth)  # NaN, which numpy and torch sort above everything, is kept
    surplus = (keep.sum(-1) > k).nonzero().flatten()  # bf16 scores tie often; fp32 hardly ever
    if len(surplus):
        keep[surplus] = _break_ties(score[surplus], kth[surplus], k)
    return keep


@cache
def _cuda_top_k() -> Callable[[Tensor, int], Tensor] | None:
    """Kernel of the selection, None where Numba has no CUDA target: `torch.topk` gives the same set, more slowly."""
    try:
        from kernels_numba.gpu.topk import keep_top_k
    except ImportError:
        return None
    return keep_top_k


def _break_ties(score: Tensor, kth: Tensor, k: int) -> Tensor:
    """Of the scores equal to the kth, keep those of lowest index until there are k; NaN equals NaN, above infinity."""
    import torch  # late: listing the methods must not load it

    nan, kth_nan = score.isnan(), kth.isnan()
    above = (score > kth) | (nan & ~kth_nan)
    equal = (score == kth) | (nan & kth_nan)
    room = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def select_threshold(score: Tensor, threshold: float | Tensor) -> Tensor:
    """Neurons of the practical mode: kept unless ``score < threshold``; so NaN is kept, and -inf keeps all."""
    return ~(score.float() < threshold)
