"""Modes of a method: which one is meant, and the selection of neurons it makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from suite.devices import dtype_name
from suite.errors import CellError, InputError
from suite.methods.base import (
    Activations,
    Calibrated,
    Method,
    Mode,
    PredictorInput,
    Site,
    SiteName,
    kept_count,
    select_threshold,
    select_top_k,
    width_of,
)
from suite.modeling.gated_mlp import GatedMLP, find_gated_mlps
from suite.registry import did_you_mean

# (site, scores of shape (n_tokens, site.width)) -> kept set, bool
Select = Callable[[Site, Tensor], Tensor]


class ThresholdState(Protocol):
    """What a practical mode needs of a fit (`suite.fitting.artifacts.Fit`)."""

    @property
    def method(self) -> str:
        """Registry name of the method it was made for."""

    @property
    def sparsity(self) -> float:
        """Target it was made for."""

    @property
    def thresholds(self) -> Tensor:
        """One threshold a site and layer, shape (n_sites * n_layers,), fp32: the layers of the first site, then the next."""


@runtime_checkable
class PredictorState(ThresholdState, Protocol):
    """What the practical mode of a method that needs a predictor asks for (`suite.fitting.artifacts.PredictorFit`)."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_model, d_ff)`` of the layers it was trained on."""

    @property
    def predictor_input(self) -> PredictorInput:
        """What it reads: the input of the MLP, or that of the block behind the block's first norm."""

    def logits(self, layer: int, x: Tensor) -> Tensor:
        """What the thresholds are set on, shape (n_tokens, d_ff), fp32, from what it reads, (n_tokens, d_model)."""

    def to(self, device: torch.device | str) -> PredictorState:
        """The same on another device."""


@runtime_checkable
class CalibratedState(ThresholdState, Protocol):
    """What a method whose score asks for moments or factors needs of a fit (`suite.fitting.artifacts.Fit`)."""

    @property
    def dtype(self) -> str:
        """Type of the weights it was made on."""

    @property
    def chosen(self) -> Mapping[str, Any]:
        """Values of the parameters that the method leaves to the fit."""

    def calibrated(self, device: torch.device) -> list[Calibrated]:
        """What it knows of every layer, on a device."""


def resolve_mode(method: Method, state: ThresholdState | None, mode: Mode | None) -> Mode:
    """The mode meant, refused with a reason where it is not possible."""
    if mode is None:
        mode = "none" if "none" in method.modes else "ideal" if state is None else "practical"
    if mode not in method.modes:
        raise InputError(f"method {method.name} has no mode {mode!r}{did_you_mean(mode, method.modes)}")
    by_rank = mode == "ideal" or (mode == "practical" and method.fixed_set)  # exactly k, by the score alone
    asks = by_rank and method.needs_calibration
    if (by_rank or mode == "none") and state is not None and not asks:
        raise InputError(f"a fit was given but the mode of method {method.name} is {mode!r}: leave one of them out")
    if asks and state is None:
        raise InputError(f"the score of {method.name} needs a fit of its moments: make one with suite.fit")
    if (
        mode == "practical"
        and not by_rank
        and (state is None or isinstance(state, PredictorState) != method.needs_predictor)
    ):
        wanted = "a trained predictor" if method.needs_predictor else "a fit of its thresholds"
        raise InputError(f"practical mode of {method.name} needs {wanted}: make one with suite.fit or use mode ideal")
    return mode


def settled(method: Method, state: object) -> Method:
    """The method with the values that its fit chose for the parameters that it leaves open; as it is where it leaves none.

    Raises
    ------
    InputError
        The fit chose none, or what is no candidate.
    """
    chosen = dict(state.chosen) if method.candidates and isinstance(state, CalibratedState) else {}
    for name, values in method.candidates.items():
        if chosen.get(name) not in values:
            raise InputError(
                f"fit of {method.name} chose {chosen.get(name)!r} for its {name}, which must be one of "
                f"{', '.join(map(str, values))}: fit anew"
            )
    return replace(method, **chosen)


def checked_thresholds(model: nn.Module, method: Method, state: ThresholdState) -> Tensor:
    """Thresholds of a fit, fp32, if it is of this method and fits this model."""
    _refuse_other(method, state)
    n_layers, n_sites = len(find_gated_mlps(model)), len(method.sites)
    if tuple(state.thresholds.shape) != (n_layers * n_sites,):
        sites = "" if n_sites == 1 else f" of {n_sites} sites"
        raise InputError(f"fit has {state.thresholds.numel()} thresholds, the model {n_layers} layers{sites}: fit anew")
    if bool(state.thresholds.isnan().any()):
        raise InputError(f"fit of {state.method} has a NaN threshold: fit anew")
    return state.thresholds.float()


def _refuse_other(method: Method, state: ThresholdState) -> None:
    """Refuse a fit of another method, sparsity or value of a parameter; those that the fit has chosen are its own."""
    meta = getattr(state, "meta", {})
    wanted = {
        name: value for name, value in method.parameters().items() if name not in ("sparsity", *meta.get("chosen", ()))
    }
    for name, value in meta.get("parameters", {}).items():
        if name in wanted and wanted[name] != value:
            raise InputError(f"fit of {state.method} has {name} {value!r}, the method {wanted[name]!r}: fit anew")
    if (state.method, state.sparsity) != (method.name, method.sparsity):
        raise InputError(
            f"fit is of {state.method} at sparsity {state.sparsity}, not of {method.name} at {method.sparsity}: fit anew"
        )


def site_thresholds(method: Method, thresholds: Tensor) -> dict[tuple[SiteName, int], float]:
    """Thresholds, shape (n_sites * n_layers,), by site and layer."""
    by_site = thresholds.view(len(method.sites), -1).tolist()
    return {
        (site, layer): value
        for site, values in zip(method.sites, by_site, strict=True)
        for layer, value in enumerate(values)
    }


def placed_calibration(model: nn.Module, method: Method, state: ThresholdState | None) -> list[Calibrated]:
    """What a fit knows of every layer, on the model's device, if it is of this method and its vectors fit the model's layers."""
    if not isinstance(state, CalibratedState):
        raise InputError(f"the score of {method.name} needs a fit that holds its moments: make one with suite.fit")
    _refuse_other(method, state)
    mlps = find_gated_mlps(model)
    weight = mlps[0].weights()[2]
    if state.dtype and state.dtype != dtype_name(weight.dtype):
        raise InputError(f"fit of {state.method} is of {state.dtype} weights, the model's are {weight.dtype}: fit anew")
    found = state.calibrated(weight.device)
    if len(found) != len(mlps):
        raise InputError(
            f"fit of {state.method} holds moments of {len(found)} layers, the model has {len(mlps)}: fit anew"
        )
    for mlp, layer in zip(mlps, found, strict=True):
        _check_calibrated(mlp, method, layer)
    return found


def _check_calibrated(mlp: GatedMLP, method: Method, layer: Calibrated) -> None:
    """Refuse a layer's part of a fit that lacks what the method declares, or has another shape than the model."""
    asked = [(f"moments of {name!r}", name in layer.moments) for name in method.moments]
    asked += [(f"factor of {name!r}", name in layer.factors) for name in method.factors]
    for what, held in asked:
        if not held:
            raise InputError(f"fit of {method.name} holds no {what} in layer {mlp.layer}: fit anew")
    for name, vector in layer.moments.items():
        width = width_of(name, mlp.d_model, mlp.d_ff)
        if vector.shape != (width,):
            raise InputError(f"fit of {method.name} has {len(vector)} moments of {name!r}, not {width}: fit anew")
    for name, factor in layer.factors.items():
        found = (len(factor.v), len(factor.u))
        if found != (mlp.d_model, mlp.d_ff):
            raise InputError(
                f"fit of {method.name} has a factor of {name!r} for layers of (d_model, d_ff) = {found}, the model's are "
                f"({mlp.d_model}, {mlp.d_ff}): fit anew"
            )
        if factor.residual.shape != (mlp.d_ff,):
            raise InputError(
                f"fit of {method.name} has {len(factor.residual)} residuals of {name!r}, not {mlp.d_ff}: fit anew"
            )
    for projection, rank in method.factors.items():
        low = layer.factors[projection]
        if (low.v.shape[1], low.u.shape[1]) != (rank, rank):
            raise InputError(
                f"fit of {method.name} has a factor of {projection!r} of rank {low.v.shape[1]}, not {rank}: fit anew"
            )


def placed_predictor(model: nn.Module, state: PredictorState) -> PredictorState:
    """A predictor, on the model's device, if its matrices fit the model's layers."""
    mlp = find_gated_mlps(model)[0]
    if state.shape != (mlp.d_model, mlp.d_ff):
        raise InputError(
            f"predictor of {state.method} is for layers of (d_model, d_ff) = {state.shape}, the model's are "
            f"({mlp.d_model}, {mlp.d_ff}): fit anew"
        )
    of = getattr(state, "activation", "")  # a gated one's
    if of and of != mlp.activation:
        raise InputError(
            f"predictor of {state.method} is for activation {of}, the model's is {mlp.activation}: fit anew"
        )
    return state.to(mlp.weights()[2].device)


@dataclass(frozen=True)
class Cut:
    """What a site keeps of a token: its k largest scores, or with k = 0 all that are not below the threshold."""

    k: int = 0
    threshold: float = -math.inf


class Selection:
    """Selection by a cut for each site: a `Select` that a kernel can stand in for.

    Parameters
    ----------
    cut : callable (site) -> Cut
    """

    def __init__(self, cut: Callable[[Site], Cut]) -> None:
        self.cut = cut

    def __call__(self, site: Site, score: Tensor) -> Tensor:
        """Kept set, bool, of scores (n_tokens, site.width)."""
        cut = self.cut(site)
        return select_top_k(score, cut.k) if cut.k else select_threshold(score, cut.threshold)


def threshold_selection(method: Method, thresholds: Tensor) -> Selection:
    """Selection by one threshold a site and layer, shape (n_sites * n_layers,)."""
    values = site_thresholds(method, thresholds)
    return Selection(lambda site: Cut(threshold=values[site.name, site.layer]))


def top_k_selection(method: Method) -> Selection:
    """Selection of the ideal mode: exactly k entries of each token."""
    return Selection(cache(lambda site: Cut(kept_count(site.width, method.sparsity_at(site)))))


@cache
def drop_kernel() -> Callable[..., None] | None:
    """Kernel that drops, counts and looks for NaN in one launch; None where Numba has no CUDA target."""
    try:
        from kernels_numba.gpu.masking import drop
    except ImportError:
        return None
    return drop


def nan_tokens(score: Tensor, activations: Activations) -> Tensor:
    """Number of tokens with a NaN score although their activations are finite, on the device: the host does not wait.

    NaN from activations that are not finite is kept, so that it reaches the output; any other is the method's fault.
    """
    # amax hands NaN on in a third of the time of isnan().any(); x is not finite where anything that it is made of is not
    total = activations.x.sum(-1, dtype=torch.float32)
    return (score.amax(-1).isnan() & torch.isfinite(total)).sum()


def refuse_nan(method: Method, n_tokens: Mapping[Site, Tensor]) -> None:
    """Refuse what was selected by scores that are NaN in a layer: its kept set means nothing."""
    for site, n_nan in n_tokens.items():
        if count := int(n_nan):
            raise CellError(
                f"method {method.name}: scores of {count} tokens in layer {site.layer} are NaN although the activations are "
                "finite; mend its score"
            )
