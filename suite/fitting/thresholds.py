"""Fit one threshold a layer, so that the practical mode realises a target sparsity."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from suite.errors import CellError, InputError
from suite.fitting.artifacts import Fit, calibrated_layers
from suite.fitting.calibration import Calibration
from suite.fitting.histogram import ScoreHistogram, exact_quantile
from suite.fitting.keys import ESTIMATORS, Estimator, fit_key, key_of
from suite.fitting.moments import calibrate
from suite.fitting.windows import Windows, batches, make_windows
from suite.methods.base import Calibrated, Method, Site, kept_count, select_threshold
from suite.methods.cost import calibrated_share
from suite.modeling.attach import LayerSparsity, attach, sparsified
from suite.modeling.gated_mlp import find_gated_mlps
from suite.modeling.loading import LoadedModel, weights_fingerprint
from suite.modeling.modes import PredictorState, Select, threshold_selection
from suite.registry import did_you_mean

__all__ = ["ESTIMATORS", "Estimator", "fit", "fit_key"]

Progress = Callable[[str], None]

# Tokens of one forward pass: bounds the memory of a fit, whatever the number of calibration tokens. The pooled scores
# of one layer of the embedded model take 25 MB, of Llama-3.1-8B 235 MB.
_CHUNK = 4096
_LOGITS = 512  # tokens whose logits are there together: 100 MB for 49k words, three times


def fit(
    loaded: LoadedModel,
    method: Method,
    calibration: Calibration | None = None,
    *,
    estimator: str = "calibrated",
    seed: int = 0,
    progress: Progress | None = None,
) -> Fit:
    """Fit the thresholds of a method on a model.

    Parameters
    ----------
    loaded : LoadedModel
    method : Method
        One whose practical mode is a threshold on its scores.
    calibration : Calibration, optional
        Text; a fourth of its documents is held out, to measure what the thresholds realise.
    estimator : {"calibrated", "mean-kth", "pooled-quantile"}
        calibrated: layer by layer, on activations made with all earlier layers already sparse, the quantile of the
        pooled scores. pooled-quantile: the same quantile on dense activations (CATS). mean-kth: mean over tokens of
        the kth score on dense activations (reference code). The last two realise less than the target.
    seed : int
        Of the shuffle of the documents.
    progress : callable, optional
        Gets one line of text.

    Raises
    ------
    InputError
        Method without a threshold, unknown estimator, unusable calibration text.
    CellError
        NaN scores.
    """
    fitted = method.needs_calibration or method.needs_threshold
    if not fitted or method.needs_predictor or method.needs_prompt:  # a calibration text has no prompt
        why = "needs a trained predictor" if method.needs_predictor else "needs none"
        raise InputError(f"method {method.name} has no threshold to fit: its practical mode {why}")
    if estimator not in ESTIMATORS:
        raise InputError(f"unknown estimator {estimator!r}{did_you_mean(estimator, ESTIMATORS)}")
    calibration = calibration or Calibration()
    if progress is not None:
        progress(f"fitting {method.name} at sparsity {method.sparsity} ({estimator}) on {calibration.description}")
    windows = make_windows(calibration, loaded.tokenizer, seed)
    fingerprint = weights_fingerprint(loaded.ref)
    meta = {
        "model": loaded.ref.name,
        "model_fingerprint": fingerprint,
        "dtype": loaded.dtype,
        "parameters": method.parameters(),
        "calibration": calibration.source if calibration.source == "pydoc" else calibration.description,
        "calibration_description": calibration.description,
        "calibration_fingerprint": calibration.fingerprint(),
        "in_domain": calibration.in_domain,
        "n_tokens": sum(map(len, windows.fit)),
        "held_out_tokens": sum(map(len, windows.held_out)),
        "seed": seed,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
    key = key_of(method, estimator, fingerprint, calibration.fingerprint(), calibration.max_tokens, seed, loaded.dtype)
    candidates = _candidates(method)
    methods = [one for one, _ in candidates]
    dense = calibrate(loaded, methods, find_gated_mlps(loaded.model), windows.fit)
    fits = [
        _fit_one(
            loaded, one, windows, Fit(method.name, method.sparsity, estimator, torch.empty(0), key, meta | more, extras)
        )
        for (one, more), extras in zip(candidates, dense, strict=True)
    ]
    return fits[0] if len(fits) == 1 else _least_divergent(loaded, method, fits, windows.fit)


def _fit_one(loaded: LoadedModel, method: Method, windows: Windows, made: Fit) -> Fit:
    """The fit of a method that leaves no parameter open; of several rounds each behind layers sparse by the one before.

    Parameters
    ----------
    made : without thresholds, with what the score asks of dense activations
    """
    mlps, estimator = find_gated_mlps(loaded.model), made.estimator
    for number in range(method.fit_rounds):
        extras = made.extras
        if number and method.needs_calibration:
            with attach(loaded.model, method, made):
                (extras,) = calibrate(loaded, [method], mlps, windows.fit)
        fitter = ThresholdFitter(loaded, method, calibrated=calibrated_layers(extras, torch.device(loaded.device)))
        thresholds = fitter.fit(windows.fit, estimator)
        made = replace(made, thresholds=thresholds, extras=extras)
    held_out = fitter.realised(windows.held_out, thresholds)
    realised = {
        "held_out_sparsity": [layer.sparsity_realized for layer in held_out],
        "held_out_sparsity_mean": math.fsum(layer.sparsity_realized for layer in held_out) / len(held_out),
    }
    share = (
        {"extra_bytes_share": calibrated_share(method, mlps[0].d_model, mlps[0].d_ff, loaded.dtype)} if extras else {}
    )
    return replace(made, meta={**made.meta, **realised, **share})


def _candidates(method: Method) -> list[tuple[Method, dict[str, Any]]]:
    """The methods that are fitted, each with what the description of its fit says of the choice."""
    if not method.candidates:
        return [(method, {})]
    names, values = method.candidates.keys(), method.candidates.values()
    chosen = [dict(zip(names, one, strict=True)) for one in product(*values)]
    return [(replace(method, **one), {"chosen": one}) for one in chosen]


def _least_divergent(loaded: LoadedModel, method: Method, fits: Sequence[Fit], windows: Sequence[list[int]]) -> Fit:
    """The fit with which the model's next-token distributions are nearest to the dense model's, all that were tried named."""
    found = divergences(loaded, method, fits, windows)
    tried = [{**fit.chosen, "kl_dense": kl} for fit, kl in zip(fits, found, strict=True)]
    best = min(range(len(fits)), key=found.__getitem__)
    return replace(fits[best], meta={**fits[best].meta, "tried": tried})


def divergences(
    loaded: LoadedModel, method: Method, states: Sequence[Fit], windows: Sequence[list[int]]
) -> list[float]:
    """Mean over tokens of KL(dense || practical mode with a fit), nats, of every fit."""

    def log_probabilities(ids: Tensor, valid: Tensor) -> Tensor:
        logits = loaded.model(input_ids=ids, attention_mask=valid, use_cache=False).logits
        return torch.log_softmax(logits[valid.bool()].float(), -1)

    totals = [0.0] * len(states)
    # once on the device, not with every batch
    placed = [
        replace(one, extras={name: part.to(loaded.device) for name, part in one.extras.items()}) for one in states
    ]
    with torch.inference_mode():
        for ids, mask in batches(windows, _LOGITS):
            ids, mask = ids.to(loaded.device), mask.to(loaded.device)
            dense = log_probabilities(ids, mask)
            for number, state in enumerate(placed):
                with attach(loaded.model, method, state, mode="practical"):
                    sparse = log_probabilities(ids, mask)
                totals[number] += float((dense.exp() * (dense - sparse)).sum().double())
    return [total / sum(map(len, windows)) for total in totals]


class ThresholdFitter:
    """Forward passes over windows of text with a selection that watches or sets thresholds.

    Parameters
    ----------
    predictor : PredictorState, optional
        Its logits take the place of the method's scores; its own thresholds are not looked at.
    calibrated : sequence of Calibrated, one a layer, optional
        What the method's scores ask of the calibration text.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        method: Method,
        predictor: PredictorState | None = None,
        *,
        calibrated: Sequence[Calibrated] = (),
    ) -> None:
        self._loaded = loaded
        self._predictor = predictor
        self._calibrated = calibrated
        self._method = method
        self._sites = [mlp.site(name) for name in method.sites for mlp in find_gated_mlps(loaded.model)]

    def fit(self, windows: Sequence[list[int]], estimator: str) -> Tensor:
        """Thresholds, shape (n_sites * n_layers,), fp32."""
        if self._method.sparsity == 0:
            return self._of_all(lambda site: -math.inf)
        if estimator == "mean-kth":
            return self._mean_kth(windows)
        if estimator == "pooled-quantile":
            return self._pooled_quantile(windows, _keep_all)
        return self._calibrate(windows)

    def realised(self, windows: Sequence[list[int]], thresholds: Tensor) -> list[LayerSparsity]:
        """Sparsity that the thresholds realise, every token sparse."""
        return self._run(windows, threshold_selection(self._method, thresholds))

    def _of_all(self, threshold: Callable[[Site], float]) -> Tensor:
        """Thresholds in the order of a fit; -inf where nothing is dropped."""
        return torch.tensor(
            [threshold(site) if self._method.sparsity_at(site) > 0 else -math.inf for site in self._sites]
        )

    def _run(self, windows: Sequence[list[int]], select: Select) -> list[LayerSparsity]:
        model, device = self._loaded.model, self._loaded.device

        def checked(site: Site, score: Tensor) -> Tensor:
            if bool(score.isnan().any()):
                raise CellError(f"NaN scores in layer {site.layer} of the calibration text: the activations overflow")
            return select(site, score)

        with (
            sparsified(
                model, self._method, checked, predictor=self._predictor, calibrated=self._calibrated
            ) as attached,
            torch.inference_mode(),
        ):
            for ids, mask in batches(windows, _CHUNK):
                # logits of one position: those of all would take 0.8 GB
                model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, logits_to_keep=1)
            return attached.sparsity()

    def _calibrate(self, windows: Sequence[list[int]]) -> Tensor:
        """Every layer's quantile with the layers before it sparse.

        One forward pass does it for a chunk: when a layer's scores are made, the thresholds of all earlier layers are
        set and have been applied to this very chunk. More text than a chunk is then streamed with these thresholds
        through histograms, whose quantiles replace them.
        """
        first = windows[: _CHUNK // max(map(len, windows))]
        found: dict[Site, float] = {}

        def set_and_apply(site: Site, score: Tensor) -> Tensor:
            found[site] = exact_quantile(score, self._method.sparsity_at(site))
            return select_threshold(score, found[site])

        self._run(first, set_and_apply)
        thresholds = self._of_all(found.__getitem__)
        if len(first) < len(windows):
            return self._pooled_quantile(windows, threshold_selection(self._method, thresholds))
        return thresholds

    def _pooled_quantile(self, windows: Sequence[list[int]], apply: Select) -> Tensor:
        histograms = {site: ScoreHistogram() for site in self._sites}

        def count(site: Site, score: Tensor) -> Tensor:
            histograms[site].add(score)
            return apply(site, score)

        self._run(windows, count)
        return self._of_all(lambda site: histograms[site].quantile(self._method.sparsity_at(site)))

    def _mean_kth(self, windows: Sequence[list[int]]) -> Tensor:
        total, n_tokens = dict.fromkeys(self._sites, 0.0), dict.fromkeys(self._sites, 0)

        def add(site: Site, score: Tensor) -> Tensor:
            k = kept_count(site.width, self._method.sparsity_at(site))
            kth = torch.topk(score.float(), k, dim=-1, sorted=True).values[:, -1]
            total[site] += float(kth.double().sum())
            n_tokens[site] += len(kth)
            return _keep_all(site, score)

        self._run(windows, add)
        return self._of_all(lambda site: total[site] / n_tokens[site])


def _keep_all(_site: Site, score: Tensor) -> Tensor:
    return torch.ones_like(score, dtype=torch.bool)
