"""What a method reads: the weights of one gated MLP for one token, as a share of the dense layer's.

With h = d_model and d = d_ff, dense reads 3hd weights. A method that computes one projection densely reads that one, and
of the other two what it keeps: (3 - 2s)hd. One that knows its active set beforehand reads 3(1 - s)hd, and its predictor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from suite.devices import DTYPE_BYTES

if TYPE_CHECKING:
    from suite.methods.base import Projection

_TERNARY_BYTES = 0.25  # of an entry: two bits


def read_share(first_projection: Projection | None, realized: float) -> float:
    """Weights read over the dense layer's at a realised sparsity; 1 for dense, whose sparsity is 0.

    Parameters
    ----------
    first_projection : of the method; None if it computes none of its projections densely
    realized : share of the d_ff neurons that are not used
    """
    return 1 - realized if first_projection is None else (3 - 2 * realized) / 3


def low_rank_weights(rank: int, d_model: int, d_ff: int) -> int:
    """Entries of the two matrices of a low-rank predictor."""
    return rank * (d_model + d_ff)


def low_rank_share(rank: int, d_model: int, d_ff: int) -> float:
    """Bytes of a low-rank predictor, which has the type of the layer, over those of the dense layer."""
    return low_rank_weights(rank, d_model, d_ff) / (3 * d_model * d_ff)


def ternary_share(dtype: str) -> float:
    """Bytes of a ternary predictor, one matrix (d_ff, d_model), over those of a dense layer of type ``dtype``."""
    return _TERNARY_BYTES / (3 * DTYPE_BYTES[dtype])
