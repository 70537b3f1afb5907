"""A low rank as the kernels of `ThresholdLayer` read it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_numba.gpu.host.checks import check_factors, check_weight
from kernels_numba.reference import LowRank


def checked_rank(low_rank: LowRank) -> int:
    """Rank of a low rank; ValueError unless its V is a matrix with at least one column."""
    v = low_rank.v
    if not isinstance(v, Tensor) or v.dim() != 2 or not v.shape[1]:
        raise ValueError("v of low_rank must be a matrix (d_model, rank) with at least one column")
    return int(v.shape[1])


def bound_low_rank(low_rank: LowRank, w_down_t: Tensor) -> LowRank:
    """V transposed, a copy, and U with zero columns added to rows that are not whole multiples of 16 bytes.

    Raises
    ------
    ValueError
        Another shape, dtype or device than those of ``w_down_t`` (d_ff, d_model) ask for, or not contiguous.
    """
    rank, (d_ff, d_model) = checked_rank(low_rank), w_down_t.shape
    check_weight("v of low_rank", low_rank.v.contiguous(), (d_model, rank), w_down_t)
    check_weight("u of low_rank", low_rank.u, (d_ff, rank), w_down_t)
    check_factors("residual of low_rank", low_rank.residual, d_ff, w_down_t.device)
    missing = -rank % (16 // w_down_t.element_size())
    u = torch.nn.functional.pad(low_rank.u, (0, missing)) if missing else low_rank.u
    return LowRank(low_rank.v.t().contiguous(), u, low_rank.residual)
