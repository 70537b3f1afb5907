"""A fit on disk: one safetensors file with its description as JSON in the header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from suite.errors import InputError
from suite.files import write_atomically
from suite.fitting.options import Predictor
from suite.methods.base import Calibrated, Factor, PredictorInput, Quantity
from suite.methods.cost import gated_share, low_rank_share, ternary_share
from suite.modeling.gated_logits import gated_logits
from suite.modeling.gated_mlp import activation

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
    thresholds : Tensor, shape (n_sites * n_layers,), fp32
        Of the layers at the method's first site, then at its next. An entry is kept unless its score is below its
        layer's; -inf, keeping all, for sparsity 0.
    key : str
        Hash of all that decided it (`suite.fitting.keys.fit_key`).
    meta : mapping of JSON values
        What it was fitted on and what it realised on held-out text.
    extras : mapping of name to Tensor, its first dimension the layer
        What the score asks for beside the activations: ``moments.<quantity>`` (n_layers, width), fp32;
        ``factor.<projection>.v`` (n_layers, d_model, rank) and ``.u`` (n_layers, d_ff, rank), the model's dtype, and
        ``.residual`` (n_layers, d_ff), fp32.
    """

    method: str
    sparsity: float
    estimator: str
    thresholds: Tensor
    key: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Hash of the content: equal tensors and description, equal hash."""
        named = {"extras": sorted(self.extras)} if self.extras else {}
        return _hash(self.description() | named, self.tensors().values())

    @property
    def extra_bytes(self) -> int:
        """Memory of what the score asks for beside the activations."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.extras.values())

    @property
    def bytes_share(self) -> float:
        """Bytes of the same over those of the dense MLPs."""
        return float(self.meta.get("extra_bytes_share", 0.0))

    @property
    def dtype(self) -> str:
        """Type of the weights it was made on; empty if that is not known."""
        return str(self.meta.get("dtype", ""))

    @property
    def chosen(self) -> Mapping[str, Any]:
        """Values that it chose for the parameters that the method leaves open."""
        return dict(self.meta.get("chosen", {}))

    def calibrated(self, device: torch.device) -> list[Calibrated]:
        """What it knows of every layer, on a device; empty if that is nothing."""
        return calibrated_layers(self.extras, device)

    def description(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON values."""
        names = ("method", "sparsity", "estimator", "key")
        return {name: getattr(self, name) for name in names} | {"meta": dict(self.meta)}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by their name in the file."""
        return {"thresholds": self.thresholds, **dict(sorted(self.extras.items()))}


def calibrated_layers(extras: Mapping[str, Tensor], device: torch.device) -> list[Calibrated]:
    """`Fit.extras` layer by layer, on a device."""
    placed = {name: tensor.to(device) for name, tensor in extras.items()}
    moments = {name.removeprefix("moments."): tensor for name, tensor in placed.items() if name.startswith("moments.")}
    factors: dict[str, list[Tensor]] = {}
    for name in placed:
        if name.startswith("factor.") and name.endswith(".v"):
            parts = [name.removesuffix("v") + part for part in ("v", "u", "residual")]
            if lacking := [part for part in parts if part not in placed]:
                raise InputError(f"fit lacks {lacking[0]}: fit anew")
            factors[name.split(".")[1]] = [placed[part] for part in parts]
    return [
        Calibrated(
            moments={name: tensor[layer] for name, tensor in moments.items()},
            factors={name: Factor(*(part[layer] for part in parts)) for name, parts in factors.items()},
        )
        for layer in range(len(next(iter(placed.values()), ())))
    ]


@dataclass(frozen=True)
class PredictorFit:
    """A trained predictor of the neurons that one method keeps at one sparsity on one model.

    A neuron is kept unless its logit is below its layer's threshold.

    Parameters
    ----------
    method : str
        Registry name of the method.
    sparsity : float
        Target.
    estimator : {"calibrated", "zero"}
        Of the thresholds: calibrated to the target, or logit > 0 as in the reference code.
    predictor : {"low-rank", "ternary", "gated"}
    rank : int or None
        None for ternary; of each projection for gated.
    thresholds : Tensor, shape (n_layers,), fp32
        On the logit; -inf, keeping all, for sparsity 0.
    v : tuple of Tensor, shape (d_model, rank), the model's dtype, one a layer
        First factor; empty for ternary; of a gated one those of its n projections side by side, (d_model, n * rank).
    u : tuple of Tensor, one a layer
        Second factor, shape (d_ff, rank), the model's dtype; ternary: the matrix, (d_ff, d_model), int8 in {-1, 0, 1};
        gated: (n, d_ff, rank).
    key : str
        Hash of all that decided it (`suite.fitting.keys.predictor_key`).
    scale : Tensor, shape (n_layers,), fp32, optional
        Ternary: what a layer's matrix is multiplied by.
    residual : tuple of Tensor, shape (n, d_ff), fp32, one a layer
        Gated: mean squares over calibration tokens of what the approximations miss.
    predicted : tuple of quantities
        Gated: what its projections approximate: ``gate``, ``act`` (behind the activation function) or ``up``. A weight a
        neuron in the square of the score (`Method.predicted_weight`) is in the last one's second factor and residual.
    activation : {"silu", "gelu_tanh", ""}
        Gated: the model's activation function.
    predictor_input : {"mlp", "block"}
        What it reads: the input of the MLP, or that of the block behind the block's first norm.
    meta : mapping of JSON values
        What it was trained on, and per layer what it reaches on held-out text.
    cost : mapping of JSON values
        Times and memory of the fit; not hashed, because a repeated fit does not repeat them.
    """

    method: str
    sparsity: float
    estimator: str
    predictor: Predictor
    rank: int | None
    thresholds: Tensor
    v: tuple[Tensor, ...]
    u: tuple[Tensor, ...]
    key: str
    scale: Tensor | None = None
    residual: tuple[Tensor, ...] = ()
    predicted: tuple[Quantity, ...] = ()
    activation: str = ""
    predictor_input: PredictorInput = "mlp"
    meta: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_model, d_ff)`` of the model's layers."""
        u = self.u[0]
        return int(self.v[0].shape[0] if self.v else u.shape[1]), int(u.shape[-2])

    @property
    def bytes_share(self) -> float:
        """Bytes of the predictor over those of the dense MLP; a ternary matrix counts 2 bits an entry."""
        if self.rank is None:
            return ternary_share(self.meta["dtype"])
        if self.predicted:
            return gated_share(self.rank, len(self.predicted), *self.shape, self.meta["dtype"])
        return low_rank_share(self.rank, *self.shape)

    def logits(self, layer: int, x: Tensor) -> Tensor:
        """``(x V) U^T``, or ``scale * x T^T`` for a ternary matrix T, or ``sqrt(prod_j (q_j^2 + residual_j))`` for a gated one.

        ``q_j = (x V_j) U_j^T``, behind the activation function where it approximates ``act``: the root of what is expected
        of the score's square.

        Parameters
        ----------
        x : Tensor, shape (n_tokens, d_model), the model's dtype
            What it reads, `predictor_input`.

        Returns
        -------
        Tensor, shape (n_tokens, d_ff), fp32
            Products of the stored values summed in fp32, as the kernels do: logits rounded to bf16 would tie at the
            threshold.
        """
        if self.predicted:
            matrices = self.v[layer], self.u[layer], self.residual[layer]
            return gated_logits(x, matrices, self.predicted, activation(self.activation))
        u = self.u[layer].float()
        if self.scale is not None:
            return (x.float() @ u.T) * self.scale[layer]
        return x.float() @ self.v[layer].float() @ u.T

    def to(self, device: torch.device | str) -> PredictorFit:
        """The same with its matrices on a device."""
        v, u, residual = (tuple(part.to(device) for part in parts) for parts in (self.v, self.u, self.residual))
        return replace(self, v=v, u=u, residual=residual, scale=None if self.scale is None else self.scale.to(device))

    @cached_property
    def sha256(self) -> str:
        """Hash of the content: equal matrices, thresholds and description, equal hash."""
        return _hash(self.description(), self.tensors().values())

    def description(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON values."""
        names = ["method", "sparsity", "estimator", "predictor", "rank", "key"]
        names += ["predicted", "activation", "predictor_input"] if self.predicted else []
        found = {name: getattr(self, name) for name in names} | {"meta": dict(self.meta)}
        return found | ({"predicted": list(self.predicted)} if self.predicted else {})

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by their name in the file."""
        found = {"thresholds": self.thresholds} | ({} if self.scale is None else {"scale": self.scale})
        for name, parts in (("v", self.v), ("u", self.u), ("residual", self.residual)):
            found |= {f"{name}.{layer}": part for layer, part in enumerate(parts)}
        return found


def _hash(description: Mapping[str, Any], tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_fit(fit: Fit | PredictorFit, folder: Path) -> Path:
    """Write ``<key>.safetensors`` in the folder, all of it or nothing; returns its path.

    Raises
    ------
    InputError
        The folder cannot be written.
    """
    path = folder / f"{fit.key}{_SUFFIX}"
    metadata = {"fit": json.dumps(fit.description() | {"sha256": fit.sha256}, sort_keys=True)}
    if isinstance(fit, PredictorFit):
        metadata["cost"] = json.dumps(dict(fit.cost), sort_keys=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in fit.tensors().items()}
    try:
        write_atomically(path, save(tensors, metadata=metadata))
    except OSError as error:
        raise InputError(f"fit {path} cannot be written: {error.strerror}") from error
    return path


def load_fit(path: Path, key: str | None = None, *, model_fingerprint: str | None = None) -> Fit | PredictorFit:
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
            cost = json.loads(stored.metadata().get("cost", "{}"))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  no mapping
        sha256 = description.pop("sha256")
        if "predictor" in description:
            fit: Fit | PredictorFit = _predictor_fit(description, tensors, cost)
        else:
            fit = Fit(**description, thresholds=tensors.pop("thresholds"), extras=tensors)
        found = fit.sha256
    except FileNotFoundError as error:
        raise InputError(f"fit {file} does not exist: make it with countdown-suite fit") from error
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"fit {file} is damaged ({error}): {_REMEDY}") from error
    if found != sha256 or fit.thresholds.dtype != torch.float32:
        raise InputError(f"fit {file} is damaged (its hash differs): {_REMEDY}")
    if key is not None and fit.key != key:
        raise InputError(f"fit {file} has key {fit.key[:16]} inside, not {key[:16]}: {_REMEDY}")
    if model_fingerprint is not None and fit.meta.get("model_fingerprint") != model_fingerprint:
        raise InputError(f"fit {file} was made on other weights ({fit.meta.get('model')}): fit on this model")
    return fit


def _predictor_fit(description: Mapping[str, Any], tensors: dict[str, Tensor], cost: Mapping[str, Any]) -> PredictorFit:
    def parts(name: str) -> tuple[Tensor, ...]:
        n_parts = sum(key.startswith(f"{name}.") for key in tensors)
        return tuple(tensors[f"{name}.{layer}"] for layer in range(n_parts))

    predicted = tuple(description.get("predicted", ()))
    return PredictorFit(
        thresholds=tensors["thresholds"],
        v=parts("v"),
        u=parts("u"),
        scale=tensors.get("scale"),
        residual=parts("residual"),
        cost=cost,
        **{**description, "predicted": predicted},
    )
