"""What a gated predictor says of every neuron: the root of what is expected of its score's square."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from suite.methods.base import Quantity


def gated_logits(
    x: Tensor,
    matrices: tuple[Tensor, Tensor, Tensor],
    predicted: Sequence[Quantity],
    act: Callable[[Tensor], Tensor],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``sqrt(prod_j (q_j^2 + residual_j))`` with ``q_j = (x V_j) U_j^T``, behind ``act`` where it approximates ``act``.

    Parameters
    ----------
    x : Tensor, shape (n_tokens, d_model)
    matrices : v (d_model, n * rank), u (n, d_ff, rank) and residual (n, d_ff), of n = len(predicted) approximations
    dtype : what is computed in

    Returns
    -------
    Tensor, shape (n_tokens, d_ff), ``dtype``
    """
    v, u, residual = matrices
    hidden = (x.to(dtype) @ v.to(dtype)).view(len(x), len(u), -1)
    square = torch.ones((), dtype=dtype, device=x.device)
    for j, name in enumerate(predicted):
        guess = hidden[:, j] @ u[j].to(dtype).T
        square = square * ((act(guess) if name == "act" else guess).square() + residual[j])
    return square.sqrt()
