"""The key of a fit: everything that decides its thresholds, known before it is made; loads no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from suite.errors import InputError
from suite.methods.base import Method
from suite.registry import did_you_mean, get_method

Estimator = Literal["calibrated", "mean-kth", "pooled-quantile"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

# Counts up when the way thresholds are fitted changes what comes out.
_VERSION = 1


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
    cls = type(method)
    fields = {
        "version": _VERSION,
        "method": f"{cls.__module__}:{cls.__qualname__}",
        "parameters": method.parameters() | {"sparsity": float(method.sparsity)},
        "estimator": estimator,
        "model": model_fingerprint,
        "calibration": calibration_fingerprint,
        "max_tokens": max_tokens,
        "seed": seed,
        "dtype": dtype,
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
