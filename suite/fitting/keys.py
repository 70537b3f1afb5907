"""The key of a fit: everything that decides its thresholds, known before it is made; loads no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from suite.errors import InputError
from suite.fitting.options import PREDICTOR_ESTIMATORS, PredictorOptions
from suite.methods.base import NEURONS, Method
from suite.registry import did_you_mean, get_method

Estimator = Literal["calibrated", "mean-kth", "pooled-quantile"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

# Count up when the way of fitting changes what comes out. By hand, where the keys of cells follow from the source: a fit takes
# minutes to hours, and is carried to machines with other code.
_VERSION = 1
_PREDICTOR_VERSION = 1


def fit_key(
    method_name: str,
    parameters: Mapping[str, Any],
    sparsity: float,
    estimator: str,
    model_fingerprint: str,
    calibration_fingerprint: str,
    max_tokens: int,
    seed: int,
    dtype: str,
) -> str:
    """Key of a fit, 64 hexadecimal digits.

    Parameters
    ----------
    method_name : str
        Registry name or ``module:Class``.
    parameters : mapping
        The method's parameters other than the sparsity; defaults may be left out.

    Raises
    ------
    InputError
        Unknown method, parameter or estimator.
    """
    own = {name: value for name, value in parameters.items() if name != "sparsity"}
    method = get_method(method_name, sparsity=sparsity, **own)
    return key_of(method, estimator, model_fingerprint, calibration_fingerprint, max_tokens, seed, dtype)


def key_of(
    method: Method,
    estimator: str,
    model_fingerprint: str,
    calibration_fingerprint: str,
    max_tokens: int,
    seed: int,
    dtype: str,
) -> str:
    """`fit_key` of a method that is built already."""
    if estimator not in ESTIMATORS:
        raise InputError(f"unknown estimator {estimator!r}{did_you_mean(estimator, ESTIMATORS)}")
    fields = _fields(method, model_fingerprint, calibration_fingerprint, max_tokens, seed, dtype)
    return _digest(fields | {"version": _VERSION, "estimator": estimator})


def training_key(
    method: Method,
    options: PredictorOptions,
    model_fingerprint: str,
    calibration_fingerprint: str,
    max_tokens: int,
    seed: int,
    dtype: str,
) -> str:
    """Key of a predictor's matrices, 64 hexadecimal digits: of all but what sets the thresholds."""
    fields = _fields(method, model_fingerprint, calibration_fingerprint, max_tokens, seed, dtype)
    return _digest(fields | {"predictor_version": _PREDICTOR_VERSION, "options": options.fields()})


def predictor_key(training: str, estimator: str) -> str:
    """Key of a `PredictorFit` from that of its training.

    Raises
    ------
    InputError
        Unknown estimator.
    """
    if estimator not in PREDICTOR_ESTIMATORS:
        raise InputError(f"unknown estimator {estimator!r}{did_you_mean(estimator, PREDICTOR_ESTIMATORS)}")
    return _digest({"training": training, "estimator": estimator})


def _fields(
    method: Method, model_fingerprint: str, calibration_fingerprint: str, max_tokens: int, seed: int, dtype: str
) -> dict[str, Any]:
    cls, own = type(method), method.parameters()
    # in the key only where they are asked for, so that the fits of all others stay; the last two may be parameters
    asked = {
        "sites": list(method.sites) if method.sites != (NEURONS,) else [],
        "moments": list(method.moments),
        "factors": dict(method.factors),
        "fit_rounds": method.fit_rounds if method.fit_rounds > 1 else 0,
        "predictor_input": method.predictor_input if method.predictor_input != "mlp" else "",
    }
    return {name: value for name, value in asked.items() if value and name not in own} | {
        "method": f"{cls.__module__}:{cls.__qualname__}",
        "parameters": own | {"sparsity": float(method.sparsity)},
        "model": model_fingerprint,
        "calibration": calibration_fingerprint,
        "max_tokens": max_tokens,
        "seed": seed,
        "dtype": dtype,
    }


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
