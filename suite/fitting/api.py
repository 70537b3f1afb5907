"""The public `fit`: thresholds, with the moments and factors that a score asks for, or a predictor."""

from __future__ import annotations

from suite.fitting import thresholds
from suite.fitting.artifacts import Fit, PredictorFit
from suite.fitting.calibration import Calibration
from suite.fitting.options import PredictorOptions
from suite.fitting.predictor import Progress, Wanted, fit_predictors
from suite.methods.base import Method
from suite.modeling.loading import LoadedModel


def fit(
    loaded: LoadedModel,
    method: Method,
    calibration: Calibration | None = None,
    *,
    estimator: str = "calibrated",
    options: PredictorOptions | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Fit | PredictorFit:
    """Fit what the practical mode of a method needs, and what its score asks of a calibration text in any mode.

    Parameters
    ----------
    loaded : LoadedModel
    method : Method, with its sparsity
    calibration : Calibration, optional
        Text; by default 4096 tokens of `pydoc`. Predictors want more: 100000 tokens of general text.
    estimator : str
        Of thresholds on scores: calibrated, mean-kth or pooled-quantile; of a predictor's: calibrated or zero.
    options : PredictorOptions, optional
        Training of a predictor; not looked at for other methods.
    seed : int
    progress : callable, optional
        Gets lines of text.

    Raises
    ------
    InputError
        Method that needs neither, unknown estimator, unusable text.
    CellError
        NaN scores or loss, not enough memory.

    Examples
    --------
    >>> state = fit(load_model("embedded"), get_method("d-countdown", sparsity=0.8), Calibration("file:texts.jsonl", 100000))
    """
    if method.needs_predictor:
        wanted = [Wanted(method, estimator)]
        return fit_predictors(loaded, wanted, calibration or Calibration(), options, seed=seed, progress=progress)[0]
    return thresholds.fit(loaded, method, calibration, estimator=estimator, seed=seed, progress=progress)
