"""What a score asks of calibration text beside a threshold: mean squares, and projections approximated by a low rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from suite.errors import CellError, InputError
from suite.fitting.windows import batches
from suite.methods.base import Activations, Factor, Method
from suite.modeling.gated_mlp import GatedMLP, find_gated_mlps
from suite.modeling.loading import LoadedModel

_CHUNK = 4096  # tokens of one forward pass
_RIDGE = 1e-4  # of the mean diagonal of E x x^T

See = Callable[[GatedMLP, Activations], None]


def calibrate(loaded: LoadedModel, method: Method, windows: Sequence[list[int]]) -> dict[str, Tensor]:
    """Moments and factors that a method asks for, over the dense activations of every token of the windows.

    Returns
    -------
    dict
        As `Fit.extras` holds them: one tensor a name, its first dimension the layer, on the CPU.

    Raises
    ------
    InputError
        A rank above d_model, or above the tokens there are.
    CellError
        NaN or infinite activations.
    """
    _check_ranks(loaded, method, sum(map(len, windows)))
    found = _moments(loaded, method, windows)
    if method.factors:
        found |= _factors(loaded, method, windows, found.pop("gram"))
    for name, stacked in found.items():
        for layer, values in enumerate(stacked):
            if not bool(values.isfinite().all()):
                raise CellError(f"{name} of layer {layer} is NaN or infinite on the calibration text")
    return found


def _check_ranks(loaded: LoadedModel, method: Method, n_tokens: int) -> None:
    d_model = find_gated_mlps(loaded.model)[0].d_model
    for name, rank in method.factors.items():
        what = f"method {method.name}: rank {rank} of its factor of {name!r}"
        if not 1 <= rank <= d_model:
            raise InputError(f"{what} must be 1 to d_model={d_model}")
        if rank > n_tokens:
            raise InputError(f"{what} is more than the {n_tokens} tokens it is fitted on: give more calibration text")


def _moments(loaded: LoadedModel, method: Method, windows: Sequence[list[int]]) -> dict[str, Tensor]:
    """Mean squares, and ``gram``, E x x^T of shape (n_layers, d_model, d_model), where factors are asked for."""
    n_tokens = sum(map(len, windows))
    sums: dict[str, dict[int, Tensor]] = {f"moments.{name}": {} for name in method.moments}
    if method.factors:
        sums["gram"] = {}

    def see(mlp: GatedMLP, made: Activations) -> None:
        for name, layers in sums.items():
            if name == "gram":
                x = made.input.float()
                part = x.T @ x
            else:
                part = getattr(made, name.removeprefix("moments.")).float().square().sum(0).double()
            layers[mlp.layer] = layers[mlp.layer] + part if mlp.layer in layers else part

    _watch(loaded, windows, see)
    return {
        name: torch.stack([layers[layer] / n_tokens for layer in sorted(layers)]).float().cpu()
        for name, layers in sums.items()
    }


def _factors(loaded: LoadedModel, method: Method, windows: Sequence[list[int]], gram: Tensor) -> dict[str, Tensor]:
    mlps = find_gated_mlps(loaded.model)
    made: dict[str, list[Factor]] = {}
    for name, rank in method.factors.items():
        made[name] = [low_rank(mlp.weights()[0 if name == "gate" else 1], gram[mlp.layer], rank) for mlp in mlps]
    missed = {name: torch.zeros(len(mlps), mlps[0].d_ff, dtype=torch.float64) for name in made}

    def see(mlp: GatedMLP, activations: Activations) -> None:
        for name, factors in made.items():
            guess = factors[mlp.layer].apply(activations.input)
            if name == "gate":
                error = activations.act.float() - mlp.act(guess)
            else:
                error = activations.up.float() - guess
            missed[name][mlp.layer] += error.double().square().sum(0).cpu()

    _watch(loaded, windows, see)
    n_tokens = sum(map(len, windows))
    found = {}
    for one, factors in made.items():
        found[f"factor.{one}.v"] = torch.stack([factor.v for factor in factors]).cpu()
        found[f"factor.{one}.u"] = torch.stack([factor.u for factor in factors]).cpu()
        found[f"factor.{one}.residual"] = (missed[one] / n_tokens).float()
    return found


def low_rank(weight: Tensor, gram: Tensor, rank: int) -> Factor:
    """The best approximation of a projection by a rank on inputs of second moments ``gram``; its residual is left 0.

    With ``C = gram + 1e-4 mean(diag(gram)) I = L L^T`` and ``svd(W L) = U S Z^T`` it is ``(U_r S_r) (Z_r^T L^-1)``, the same
    for every such L. Here L is from the eigenvectors of gram, whose eigenvalues rounding can make negative; a Cholesky
    factorisation would fail then.

    Parameters
    ----------
    weight : Tensor, shape (d_ff, d_model)
    gram : Tensor, shape (d_model, d_model), fp32
        E x x^T.
    """
    wide, gram = weight.detach().double(), gram.double().to(weight.device)
    ridge = (_RIDGE * gram.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny)  # of inputs that are all 0
    values, vectors = torch.linalg.eigh(gram)
    scale = (values.clamp(min=0) + ridge).sqrt()
    # left singular vectors Z of (W L)^T, of the small side: (W L)^T (W L) = Z S^2 Z^T
    product = wide @ (vectors * scale)
    right = torch.linalg.eigh(product.T @ product).eigenvectors[:, -rank:].flip(1)
    v = vectors @ (right / scale[:, None])
    u = product @ right
    # columns of equal length in both: V is as large as 1 / sqrt(ridge) for dead inputs, which fp16 cannot hold
    size = (u.norm(dim=0) / v.norm(dim=0)).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    v, u = v * size, u / size
    return Factor(v.to(weight.dtype), u.to(weight.dtype), torch.zeros(len(weight), device=weight.device))


def _watch(loaded: LoadedModel, windows: Sequence[list[int]], see: See) -> None:
    """Show every layer's dense activations of all tokens of the windows, chunk by chunk; nothing is kept."""
    valid = torch.empty(0)

    def hook(mlp: GatedMLP) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda _module, args: see(mlp, mlp.activations(args[0][valid]))

    with ExitStack() as undo, torch.inference_mode():
        for mlp in find_gated_mlps(loaded.model):
            undo.callback(mlp.module.register_forward_pre_hook(hook(mlp)).remove)
        for ids, mask in batches(windows, _CHUNK):
            mask = mask.to(loaded.device)
            valid = mask.bool()
            # logits of one position: those of all would take 0.8 GB
            loaded.model(input_ids=ids.to(loaded.device), attention_mask=mask, use_cache=False, logits_to_keep=1)
