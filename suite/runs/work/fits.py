"""Makes fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from suite.errors import InputError
from suite.fitting.artifacts import Fit, PredictorFit, save_fit
from suite.fitting.calibration import Calibration
from suite.fitting.predictor import Wanted, discard_partial, fit_predictors
from suite.fitting.thresholds import fit
from suite.modeling.loading import LoadedModel
from suite.registry import get_method

if TYPE_CHECKING:
    from suite.methods.base import Method
    from suite.runs.fits import FitRequest


def make_fit(
    loaded: LoadedModel,
    key: str,
    folder: Path,
    together: Mapping[str, FitRequest],
    *,
    activation_budget_gib: float | None,
    say: Callable[[str], None],
) -> None:
    """Make the fit of a key below ``folder``; predictors with all others of ``together``, which have the same options."""
    request = together[key]
    calibration = Calibration(request.calibration, request.max_tokens)
    if request.options is None:
        one = fit(loaded, _method(request), calibration, estimator=request.estimator, seed=request.seed)
        _save([one], key, folder)
        return
    made = fit_predictors(
        loaded,
        [Wanted(_method(each), each.estimator) for each in together.values()],
        calibration,
        request.options,
        seed=request.seed,
        activation_budget_gib=activation_budget_gib,
        folder=folder,
        progress=say,
    )
    _save(made, key, folder)
    discard_partial(made, folder)


def _save(made: Sequence[Fit | PredictorFit], key: str, folder: Path) -> None:
    if key not in {fit.key for fit in made}:
        raise InputError(f"fit of {made[0].method} has key {made[0].key[:16]}, the run expects {key[:16]}")
    for one in made:
        save_fit(one, folder)


def _method(request: FitRequest) -> Method:
    return get_method(request.method, sparsity=request.sparsity, **request.params)
