"""What a method reads: the weights of one gated MLP for one token, as a share of the dense layer's.

With h = d_model and d = d_ff, dense reads 3hd weights. A method that computes one projection densely reads that one, and
of the other two what it keeps: (3 - 2s)hd. One that knows its active set beforehand reads 3(1 - s)hd, and its predictor.
One that masks the inputs of projections reads the columns of what it keeps, of the rows that it computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from suite.devices import DTYPE_BYTES
from suite.methods.base import NEURONS, width_of

if TYPE_CHECKING:
    from suite.methods.base import Method, SiteName

_TERNARY_BYTES = 0.25  # of an entry: two bits


def read_share(method: type[Method] | None, realised: float) -> float:
    """Weights read over the dense layer's at one realised sparsity, without a predictor's; 1 for dense, whose sparsity is 0.

    Parameters
    ----------
    method : what its contract says; None for an active set that is given
    realised : share of the entries of its sites that are not used
    """
    return 1 - realised if method is None else share_of_sites(method, dict.fromkeys(method.sites, realised))


def share_of_sites(method: type[Method], realised: Mapping[SiteName, float]) -> float:
    """The same at a realised sparsity of each site: rows of gate and up for its neurons, columns for its inputs."""
    neurons, inputs = 1 - realised.get(NEURONS, 0.0), 1 - realised.get("mlp.input", 0.0)
    dense = {None: 0, "both": 2}.get(method.first_projection, 1)  # of gate and up, whose neurons are all computed
    return (inputs * (dense + (2 - dense) * neurons) + neurons) / 3


def calibrated_bytes(method: Method, d_model: int, d_ff: int, dtype: str) -> int:
    """Bytes a layer of the vectors and factors that a method's score asks of its fit.

    Parameters
    ----------
    dtype : type of the layer's weights, which a factor's two matrices have; its residual and moments are fp32
    """
    moments = sum(width_of(name, d_model, d_ff) for name in method.moments)
    factors = sum(DTYPE_BYTES[dtype] * low_rank_weights(rank, d_model, d_ff) for rank in method.factors.values())
    return int(factors) + DTYPE_BYTES["float32"] * (moments + len(method.factors) * d_ff)


def calibrated_share(method: Method, d_model: int, d_ff: int, dtype: str) -> float:
    """The same over the bytes of the dense layer."""
    return calibrated_bytes(method, d_model, d_ff, dtype) / (3 * d_model * d_ff * DTYPE_BYTES[dtype])


def low_rank_weights(rank: int, d_model: int, d_ff: int) -> int:
    """Entries of the two matrices of a low-rank predictor."""
    return rank * (d_model + d_ff)


def low_rank_share(rank: int, d_model: int, d_ff: int) -> float:
    """Bytes of a low-rank predictor, which has the type of the layer, over those of the dense layer."""
    return low_rank_weights(rank, d_model, d_ff) / (3 * d_model * d_ff)


def gated_rank(most: int, n_projections: int) -> int:
    """Rank of each projection of a gated predictor that reads no more, residuals counted, than a low-rank one of rank ``most``.

    An fp32 number a neuron costs as much as 2 d_ff / (d_model + d_ff) < 2 of rank in weights of 2 bytes.
    """
    return max(1, most // n_projections - 2)


def gated_share(rank: int, n_projections: int, d_model: int, d_ff: int, dtype: str) -> float:
    """Bytes of a gated predictor, of each projection two matrices and an fp32 vector, over those of a dense layer."""
    vectors = DTYPE_BYTES["float32"] / (3 * d_model * DTYPE_BYTES[dtype])
    return n_projections * (low_rank_share(rank, d_model, d_ff) + vectors)


def ternary_share(dtype: str) -> float:
    """Bytes of a ternary predictor, one matrix (d_ff, d_model), over those of a dense layer of type ``dtype``."""
    return _TERNARY_BYTES / (3 * DTYPE_BYTES[dtype])
