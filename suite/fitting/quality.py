"""How well a predictor finds the neurons of its method's ideal rule, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from suite.fitting.artifacts import PredictorFit
from suite.methods.base import Method, kept_count, select_threshold, select_top_k
from suite.modeling.gated_mlp import GatedMLP

_CHUNK = 2048


def layer_quality(
    fit: PredictorFit, method: Method, mlps: Sequence[GatedMLP], inputs: Tensor, seen: Tensor
) -> list[dict[str, float]]:
    """Means over tokens for every layer.

    Parameters
    ----------
    fit : PredictorFit, on the device of the inputs
    inputs : Tensor, shape (len(mlps), n_tokens, d_model)
    seen : Tensor, shape (len(mlps), n_tokens, d_model)
        What the predictor reads.

    Returns
    -------
    list of dict
        ``recall``, ``precision``: of the kept set against the method's ideal k. ``overlap_at_k``: share of the ideal k
        among the k largest logits. ``mass_kept``, ``mass_kept_ideal``: share of the sum of v^2 that the kept set, and
        the ideal k, hold. ``sparsity_realized``, and ``sparsity_spread``, its standard deviation over tokens.
    """
    found = []
    with torch.inference_mode():
        for mlp, x, read in zip(mlps, inputs, seen, strict=True):
            chunks = zip(x.split(_CHUNK), read.split(_CHUNK), strict=True)
            parts = [_token_quality(fit, method, mlp, *chunk) for chunk in chunks]
            values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            spread = values["sparsity_realized"].std(correction=0)
            found.append({name: float(value.mean()) for name, value in values.items()})
            found[-1]["sparsity_spread"] = float(spread)
    return found


def _token_quality(fit: PredictorFit, method: Method, mlp: GatedMLP, x: Tensor, seen: Tensor) -> dict[str, Tensor]:
    """The same for every token, each of shape (n_tokens,), fp64."""
    made = mlp.activations(x)
    logit = fit.logits(mlp.layer, seen)
    k = kept_count(mlp.d_ff, method.sparsity)
    ideal = select_top_k(method.score(made), k)
    kept = select_threshold(logit, float(fit.thresholds[mlp.layer]))
    best = select_top_k(logit, k)
    mass = made.product.double().square()
    total = mass.sum(-1).clamp(min=1e-300)
    both, n_kept = (kept & ideal).sum(-1).double(), kept.sum(-1).double()
    return {
        "recall": both / k,
        "precision": both / n_kept.clamp(min=1),
        "overlap_at_k": (best & ideal).sum(-1).double() / k,
        "mass_kept": (mass * kept).sum(-1) / total,
        "mass_kept_ideal": (mass * ideal).sum(-1) / total,
        "sparsity_realized": 1 - n_kept / mlp.d_ff,
    }
