"""A fit on disk: one small safetensors file with its description as JSON in the header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from suite.errors import InputError
from suite.modeling.sources import write_atomically

_SUFFIX = ".safetensors"
_REMEDY = "delete it and fit anew"


@dataclass(frozen=True)
class Fit:
    """Fitted thresholds of one method at one sparsity on one model.

    Parameters
    ----------
    method : str
        Registry name of the method.
    sparsity : float
        Target.
    estimator : {"calibrated", "mean-kth", "pooled-quantile"}
    thresholds : Tensor, shape (n_layers,), fp32
        A neuron is kept unless its score is below its layer's; -inf, keeping all, for sparsity 0.
    key : str
        Hash of all that decided it (`suite.fitting.keys.fit_key`).
    meta : mapping of JSON values
        What it was fitted on and what it realised on held-out text.
    """

    method: str
    sparsity: float
    estimator: str
    thresholds: Tensor
    key: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Hash of the content: equal thresholds and description, equal hash."""
        values = self.thresholds.detach().cpu().numpy().astype("<f4").tobytes()
        return hashlib.sha256(json.dumps(self._description(), sort_keys=True).encode() + values).hexdigest()

    def _description(self) -> dict[str, Any]:
        names = ("method", "sparsity", "estimator", "key")
        return {name: getattr(self, name) for name in names} | {"meta": dict(self.meta)}


def save_fit(fit: Fit, folder: Path) -> Path:
    """Write ``<key>.safetensors`` in the folder, all of it or nothing; returns its path.

    Raises
    ------
    InputError
        The folder cannot be written.
    """
    path = folder / f"{fit.key}{_SUFFIX}"
    metadata = {"fit": json.dumps(fit._description() | {"sha256": fit.sha256}, sort_keys=True)}
    try:
        write_atomically(path, save({"thresholds": fit.thresholds.contiguous()}, metadata=metadata))
    except OSError as error:
        raise InputError(f"fit {path} cannot be written: {error.strerror}") from error
    return path


def load_fit(path: Path, key: str | None = None, *, model_fingerprint: str | None = None) -> Fit:
    """Read a fit from its file, or from a folder by its key.

    Raises
    ------
    InputError
        No such fit, a damaged file, another key inside, or a fit of another model.
    """
    file = path / f"{key}{_SUFFIX}" if path.is_dir() and key is not None else path
    try:
        with safe_open(file, framework="pt") as stored:
            description = json.loads(stored.metadata()["fit"])
            thresholds = stored.get_tensor("thresholds")
        sha256 = description.pop("sha256")
        fit = Fit(thresholds=thresholds, **description)
    except FileNotFoundError as error:
        raise InputError(f"fit {file} does not exist: make it with countdown-suite fit") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"fit {file} is damaged ({error}): {_REMEDY}") from error
    if fit.sha256 != sha256 or fit.thresholds.dtype != torch.float32:
        raise InputError(f"fit {file} is damaged (its hash differs): {_REMEDY}")
    if key is not None and fit.key != key:
        raise InputError(f"fit {file} has key {fit.key[:16]} inside, not {key[:16]}: {_REMEDY}")
    if model_fingerprint is not None and fit.meta.get("model_fingerprint") != model_fingerprint:
        raise InputError(f"fit {file} was made on other weights ({fit.meta.get('model')}): fit on this model")
    return fit
