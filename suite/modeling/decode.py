"""CPU kernels for decode steps of one sequence: threshold methods, fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from suite.methods.base import Activations, Method, Mode
from suite.modeling.gated_mlp import find_gated_mlps

if TYPE_CHECKING:
    from kernels_numba.cpu import ThresholdLayer


def why_not_numba(model: nn.Module, method: Method, mode: Mode) -> str:
    """Reason why the CPU kernels cannot stand in for this method on this model; empty if they can."""
    if mode != "practical":
        return f"it needs a threshold, and the mode is {mode}"
    mlps = find_gated_mlps(model)
    weights = [weight for mlp in mlps for weight in mlp.weights()]
    if any(weight.device.type != "cpu" or weight.dtype != torch.float32 for weight in weights):
        return "its kernels are for float32 on the CPU"
    if any(mlp.has_bias() for mlp in mlps):
        return "its kernels add no bias"
    return "" if _is_magnitude(method) else f"its kernels do not compute the score of {method.name}"


def _is_magnitude(method: Method) -> bool:
    """Whether the score is the magnitude of the first projection, seen from its values on a sample."""
    generator = torch.Generator().manual_seed(0)
    gate, act, up = (torch.randn(4, 64, generator=generator) for _ in range(3))
    keys = torch.arange(4)
    score = method.score(
        Activations(
            gate=gate, act=act, up=up, down_norms=lambda: torch.ones(64), layer=0, documents=keys, positions=keys
        )
    )
    magnitude = {"gate": act, "up": up}.get(method.first_projection or "")
    return magnitude is not None and torch.equal(score.float(), magnitude.abs())


def decode_kernels(model: nn.Module, method: Method, thresholds: Tensor) -> list[ThresholdLayer]:
    """One kernel a layer; each holds a transposed copy of its layer's ``W_down``."""
    import numba  # late: 1 s, and only this backend needs it

    from kernels_numba.cpu import ThresholdLayer, transpose_down

    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    kernels = []
    for mlp, threshold in zip(find_gated_mlps(model), thresholds.tolist(), strict=True):
        w_gate, w_up, w_down = (weight.detach() for weight in mlp.weights())
        kernels.append(
            ThresholdLayer(
                w_gate,
                w_up,
                transpose_down(w_down),
                activation=mlp.activation,
                first=method.first_projection or "",
                threshold=threshold,
                threads=threads,
            )
        )
    return kernels
