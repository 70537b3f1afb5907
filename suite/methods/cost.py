"""What a method reads: the weights of one gated MLP for one token, as a share of the dense layer's.

With h = d_model and d = d_ff, dense reads 3hd weights. A method that computes one projection densely reads that one, and
of the other two what it keeps: (3 - 2s)hd. One that knows its active set beforehand reads 3(1 - s)hd, and its predictor.
One that masks the inputs of projections reads the columns of what it keeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from suite.devices import DTYPE_BYTES
from suite.methods.base import NEURONS

if TYPE_CHECKING:
    from suite.methods.base import Method

_TERNARY_BYTES = 0.25  # of an entry: two bits


def read_share(method: type[Method] | None, realized: float) -> float:
    """Weights read over the dense layer's at a realised sparsity, without a predictor's; 1 for dense, whose sparsity is 0.

    Parameters
    ----------
    method : what its contract says; None for an active set that is given
    realized : share of the entries of its sites that are not used
    """
    kept = 1 - realized
    if method is None or method.needs_predictor:
        return kept
    if "mlp.input" in method.sites:  # columns of gate and up, and of down those of the neurons
        return (2 * kept + (kept if NEURONS in method.sites else 1)) / 3
    if method.first_projection is None:
        return kept
    return (3 - (1 if method.first_projection == "both" else 2) * realized) / 3


def low_rank_weights(rank: int, d_model: int, d_ff: int) -> int:
    """Entries of the two matrices of a low-rank predictor."""
    return rank * (d_model + d_ff)


def low_rank_share(rank: int, d_model: int, d_ff: int) -> float:
    """Bytes of a low-rank predictor, which has the type of the layer, over those of the dense layer."""
    return low_rank_weights(rank, d_model, d_ff) / (3 * d_model * d_ff)


def ternary_share(dtype: str) -> float:
    """Bytes of a ternary predictor, one matrix (d_ff, d_model), over those of a dense layer of type ``dtype``."""
    return _TERNARY_BYTES / (3 * DTYPE_BYTES[dtype])
