"""Makes the kernels of all layers of a model, by the contract of its method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from suite.methods.base import NEURONS, Calibrated, Factor, Method, kept_count, select_threshold, select_top_k
from suite.modeling.decode import ChoosingKernels, DecodeKernels, ListedKernels, Listing
from suite.modeling.gated_mlp import GatedMLP, find_gated_mlps
from suite.modeling.gathered import GatheredLayers
from suite.modeling.modes import PredictorState

if TYPE_CHECKING:
    from kernels_numba.reference import Gated


def decode_kernels(
    model: nn.Module,
    method: Method,
    thresholds: Tensor | None,
    predictor: PredictorState | None,
    *,
    calibrated: Sequence[Calibrated] | None = None,
    deterministic: bool = False,
) -> DecodeKernels:
    """Kernels of every layer; each holds a transposed copy of its layer's ``W_down``.

    ``calibrated``, what the fit knows of each layer, is what the factors of neurons come from. Of a method with a fixed set,
    which has no thresholds, copies of the kept neurons, made here or, where it needs a prompt, by `PromptKernels.gather`.
    """
    mlps = find_gated_mlps(model)
    if method.fixed_set:
        gathering = GatheredLayers(mlps, method.sparsity if method.needs_prompt else None)
        if not method.needs_prompt:
            for mlp in mlps:
                gathering.gather(mlp.layer, _fixed(mlp, method, calibrated[mlp.layer] if calibrated else None))
        return gathering
    assert thresholds is not None
    values, known = thresholds.tolist(), calibrated or [Calibrated()] * len(mlps)
    on_cuda = mlps[0].weights()[2].is_cuda
    if predictor is not None:
        if on_cuda and predictor.predictor_input == "mlp" and chooses_on_cuda(predictor):
            return ChoosingKernels(cuda_predicting(mlps, values, predictor))
        given = _cuda_given if on_cuda else _cpu_given
        return ListedKernels([given(mlp, predictor, value) for mlp, value in zip(mlps, values, strict=True)])
    if on_cuda:
        return _cuda_choosing(mlps, method, values, known, deterministic=deterministic)
    triples = zip(mlps, values, known, strict=True)
    return ListedKernels([_cpu_threshold(mlp, method, value, one) for mlp, value, one in triples])


def _fixed(mlp: GatedMLP, method: Method, calibrated: Calibrated | None) -> Tensor:
    """The set of a method that knows it before any token, (1, d_ff), bool."""
    weight = mlp.weights()[2]
    x = torch.zeros(1, mlp.d_model, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        score = method.score(mlp.activations(x, calibrated=calibrated))
    return select_top_k(score, kept_count(mlp.d_ff, method.sparsity_at(mlp.site(NEURONS))))


def _cpu_threads() -> int:
    import numba  # late: 1 s, and only this backend needs it

    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)


def _cpu_threshold(mlp: GatedMLP, method: Method, threshold: float, known: Calibrated) -> Listing:
    from kernels_numba.cpu import ThresholdLayer, transpose_down

    w_gate, w_up, w_down = (weight.detach() for weight in mlp.weights())
    layer = ThresholdLayer(
        w_gate,
        w_up,
        transpose_down(w_down),
        activation=mlp.activation,
        threshold=threshold,
        threads=_cpu_threads(),
        **_of_score(method, known),
    )
    of_block = method.predictor_input == "block"

    def run(x: Tensor, block: Tensor | None) -> tuple[Tensor, Tensor, int]:
        y = layer(x, seen=block) if of_block else layer(x)
        return y, torch.from_numpy(layer.active), layer.count

    return run


def _of_score(method: Method, known: Calibrated) -> dict[str, Any]:
    """What of a threshold kernel's arguments says how the method scores."""
    from kernels_numba.reference import LowRank

    factor = method.low_rank(known)
    low_rank = None if factor is None else LowRank(factor.v, factor.u, factor.residual)
    return {"first": method.exact_projection, "scale": method.neuron_scale(known), "low_rank": low_rank}


def _cpu_given(mlp: GatedMLP, predictor: PredictorState, threshold: float) -> Listing:
    """The predictor in torch, as the masked backend computes it, then the kernel for a given set."""
    from kernels_numba.cpu import GivenLayer, transpose_down

    w_gate, w_up, w_down = (weight.detach() for weight in mlp.weights())
    layer = GivenLayer(w_gate, w_up, transpose_down(w_down), activation=mlp.activation, threads=_cpu_threads())

    def run(x: Tensor, block: Tensor | None) -> tuple[Tensor, Tensor, int]:
        seen = x if block is None or predictor.predictor_input == "mlp" else block
        keep = select_threshold(predictor.logits(mlp.layer, seen.reshape(1, -1)), threshold)
        listed = keep[0].nonzero()[:, 0]
        return layer(x, listed), listed, layer.count

    return run


def _cuda_given(mlp: GatedMLP, predictor: PredictorState, threshold: float) -> Listing:
    """The same on a GPU, for predictors that have no kernel of their own; the count stays on the device."""
    from kernels_numba.gpu.host.layers import GivenLayer, transpose_down

    w_gate, w_up, w_down = (weight.detach() for weight in mlp.weights())
    layer = GivenLayer(w_gate, w_up, transpose_down(w_down), activation=mlp.activation)

    def run(x: Tensor, block: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        seen = x if block is None or predictor.predictor_input == "mlp" else block
        keep = select_threshold(predictor.logits(mlp.layer, seen.reshape(1, -1)), threshold)[0]
        listed = torch.nonzero_static(keep, size=mlp.d_ff, fill_value=0)[:, 0].int()
        count = keep.sum(dtype=torch.int32)
        return layer(x.contiguous(), listed, count.reshape(1)), listed, count

    return run


def _cuda_choosing(
    mlps: Sequence[GatedMLP],
    method: Method,
    thresholds: Sequence[float],
    known: Sequence[Calibrated],
    *,
    deterministic: bool,
) -> ChoosingKernels:
    """CUDA layers that choose by the first projection; factors of a low rank that reads the block's input come from torch."""
    from kernels_numba.gpu.host.layers import ThresholdLayer, transpose_down

    layers: list[Any] = []
    factors: list[Factor] = []
    for mlp, threshold, one in zip(mlps, thresholds, known, strict=True):
        w_gate, w_up, w_down = (weight.detach() for weight in mlp.weights())
        options = _of_score(method, one)
        if (factor := method.low_rank(one)) is not None and method.predictor_input == "block":
            factors.append(replace(factor, v=factor.v.float(), u=factor.u.float()))
            options |= {"scale": torch.zeros_like(factor.residual), "low_rank": None}
        if options["low_rank"] is None:
            del options["low_rank"]
        options |= {"activation": mlp.activation, "threshold": threshold, "deterministic": deterministic}
        layers.append(ThresholdLayer(w_gate, w_up, transpose_down(w_down), **options))
    return ChoosingKernels(layers, factors, mlps[0].act if method.exact_projection == "up" else None)


def chooses_on_cuda(predictor: PredictorState) -> bool:
    """Whether a CUDA kernel computes the logits too: of low-rank matrices, and of a gated predictor with one part a projection."""
    predicted = getattr(predictor, "predicted", ())
    return bool(getattr(predictor, "v", None)) and not {"gate", "act"} <= set(predicted)


def gated_parts(predictor: Any, layer: int, dtype: torch.dtype) -> Gated:
    """A layer of a gated predictor as its kernel takes it."""
    from kernels_numba.reference import Gated, LowRank

    named = predictor.predicted
    v, u, residual = predictor.v[layer].to(dtype).chunk(len(named), 1), predictor.u[layer].to(dtype), predictor.residual
    parts = {name: LowRank(v[j], u[j], residual[layer][j]) for j, name in enumerate(named)}
    return Gated(parts.get("act", parts.get("gate")), parts.get("up"), act="act" in parts)


def cuda_predicting(mlps: Sequence[GatedMLP], thresholds: Sequence[float], predictor: PredictorState) -> list[Any]:
    """CUDA layers with a low-rank or a gated predictor."""
    from kernels_numba.gpu.host.gated import GatedPredictorLayer
    from kernels_numba.gpu.host.layers import PredictorLayer, transpose_down

    layers: list[Any] = []
    for mlp, threshold in zip(mlps, thresholds, strict=True):
        w_gate, w_up, w_down = (weight.detach() for weight in mlp.weights())
        weights = (w_gate, w_up, transpose_down(w_down))
        if getattr(predictor, "predicted", ()):
            gated = gated_parts(predictor, mlp.layer, w_up.dtype)
            layers.append(GatedPredictorLayer(*weights, gated, activation=mlp.activation, threshold=threshold))
            continue
        v, u = predictor.v[mlp.layer], predictor.u[mlp.layer]  # type: ignore[attr-defined]
        v, u = v.T.to(w_up.dtype).contiguous(), u.to(w_up.dtype).contiguous()
        layers.append(PredictorLayer(*weights, v, u, activation=mlp.activation, threshold=threshold))
    return layers
