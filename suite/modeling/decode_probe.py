"""One step of the kernels against the model's own modules, before they stand in for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from suite.methods.base import NEURONS, Activations, Calibrated, Method, kept_count, select_threshold
from suite.modeling.decode import DecodeKernels, PromptKernels
from suite.modeling.gated_mlp import GatedMLP, find_gated_mlps
from suite.modeling.modes import PredictorState


@torch.no_grad()
def why_not_equal(
    model: nn.Module,
    method: Method,
    thresholds: Tensor | None,
    predictor: PredictorState | None,
    kernels: DecodeKernels,
    calibrated: Sequence[Calibrated] | None = None,
) -> str:
    """First layer whose kernel does not compute what the masked backend does on a random token; empty if none.

    The types of the modules are known by then (`GatedMLP.why_not_plain`); this finds what types do not show.
    """
    reads = method.predictor_input if predictor is None else predictor.predictor_input
    for mlp in find_gated_mlps(model):
        weight = mlp.weights()[2]
        generator = torch.Generator().manual_seed(mlp.layer)
        x, block = (
            torch.randn(1, 1, mlp.d_model, generator=generator).to(weight.device, weight.dtype) for _ in range(2)
        )
        known = calibrated[mlp.layer] if calibrated else None
        made = mlp.activations(x.flatten(0, -2), block=block.flatten(0, -2), calibrated=known)
        if thresholds is None:  # a fixed set, whose kernels are told it
            score, threshold = None, 0.0
            if method.needs_prompt and isinstance(kernels, PromptKernels):
                k = kept_count(mlp.d_ff, method.sparsity_at(mlp.site(NEURONS)))
                kernels.gather(mlp.layer, torch.arange(mlp.d_ff, device=weight.device)[None] >= mlp.d_ff - k)
        else:
            seen = made.block if reads == "block" else made.input
            score = (method.score(made) if predictor is None else predictor.logits(mlp.layer, seen))[0].float()
            threshold = float(thresholds[mlp.layer])
        if not _equal(mlp, made, score, threshold, kernels, (x, block)):
            return f"its kernel does not compute what {mlp.module_name} does"
    return ""


def _equal(
    mlp: GatedMLP,
    made: Activations,
    score: Tensor | None,
    threshold: float,
    kernels: DecodeKernels,
    inputs: tuple[Tensor, Tensor],
) -> bool:
    """Whether the kernel keeps the neurons above the threshold, and gives their output, each up to rounding."""
    x = inputs[0]
    found = kernels.run(mlp.layer, *inputs).float()
    used = torch.zeros(mlp.d_ff, dtype=torch.bool, device=x.device)
    used[kernels.active(mlp.layer)] = True
    # 16 roundings of the weights' dtype, and sums in fp32 whose errors grow like the root of their length
    tolerance = 16 * torch.finfo(x.dtype).eps + 4 * math.sqrt(mlp.d_model + mlp.d_ff) * torch.finfo(torch.float32).eps
    if score is not None:
        clear = (score - threshold).abs() > tolerance * score.abs().max()
        if bool((clear & (used != select_threshold(score, threshold))).any()):
            return False
    expected = mlp.down((made.product * used).view(1, 1, -1)).float()
    return bool((found - expected).norm() <= tolerance * expected.norm())
