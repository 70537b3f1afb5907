"""Gated predictors: the projections that a score is made of, each of a low rank, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from suite.errors import InputError
from suite.fitting.moments import low_rank
from suite.methods.base import Method
from suite.modeling.gated_mlp import GatedMLP

_CHUNK = 2048  # tokens whose activations are there together


def need_predicted(method: Method) -> None:
    """Refuse a method whose score is not made of projections.

    Raises
    ------
    InputError
        It is not.
    """
    if not method.predicted:
        raise InputError(
            f"method {method.name} has no gated predictor: its score is no magnitude of projections; "
            "use low-rank or ternary"
        )


def fit_layer(mlp: GatedMLP, method: Method, x: Tensor, seen: Tensor, rank: int) -> tuple[dict[str, Tensor], float]:
    """A gated predictor of one layer: whitened singular value decompositions in fp64, then what they miss.

    Parameters
    ----------
    x : Tensor, shape (n_tokens, d_model), the model's dtype
        Inputs of the MLP.
    seen : Tensor, shape (n_tokens, d_model), the model's dtype
        What the predictor reads: x itself, or the block's normed input.

    Returns
    -------
    matrices : dict
        ``v``, ``u`` in the model's dtype and ``residual``, as in `PredictorFit`, on the CPU.
    missed : float
        Share of the mean square of the predicted quantities that the approximations miss, mean over the quantities.
    """
    gram = _second_moments(seen, seen)
    cross = None if seen is x else _second_moments(x, seen)
    projections = [mlp.weights()[1 if name == "up" else 0] for name in method.predicted]
    factors = [low_rank(weight, gram, rank, cross) for weight in projections]
    residual = torch.zeros(len(factors), mlp.d_ff, dtype=torch.float64, device=x.device)
    total = torch.zeros_like(residual)
    with torch.inference_mode():
        for own, read in zip(x.split(_CHUNK), seen.split(_CHUNK), strict=True):
            made = mlp.activations(own)
            for j, (name, factor) in enumerate(zip(method.predicted, factors, strict=True)):
                guess = factor.apply(read)
                right = getattr(made, name).float()
                residual[j] += (right - (mlp.act(guess) if name == "act" else guess)).double().square().sum(0)
                total[j] += right.double().square().sum(0)
    missed = float((residual.sum(1) / total.sum(1).clamp(min=1e-300)).mean())
    u, mean = torch.stack([factor.u for factor in factors]), (residual / len(x)).float()
    weight = method.predicted_weight(mlp.norm2)
    if weight is not None:  # of the square: (w q^2 + w residual) for the last, which no activation function follows
        u[-1] = (u[-1].float() * weight.sqrt()[:, None]).to(u.dtype)
        mean[-1] *= weight
    v = torch.cat([factor.v for factor in factors], 1)
    return {"v": v.cpu(), "u": u.cpu().contiguous(), "residual": mean.cpu()}, missed


def _second_moments(x: Tensor, y: Tensor) -> Tensor:
    """``E x y^T`` over tokens, (d_model, d_model), fp32, of x and y (n_tokens, d_model)."""
    total = torch.zeros(x.shape[1], y.shape[1], device=x.device)
    for own, other in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
        total += own.float().T @ other.float()
    return total / len(x)
