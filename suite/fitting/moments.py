"""What a score asks of calibration text beside a threshold: mean squares, and projections approximated by a low rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from suite.errors import CellError, InputError
from suite.fitting.windows import batches
from suite.methods.base import Activations, Factor, Method, PredictorInput, Projection
from suite.modeling.gated_mlp import GatedMLP, block_norm
from suite.modeling.loading import LoadedModel

_CHUNK = 4096  # tokens of one forward pass
_RIDGE = 1e-4  # of the mean diagonal of E x x^T

See = Callable[[GatedMLP, Activations], None]


def calibrate(
    loaded: LoadedModel, methods: Sequence[Method], mlps: Sequence[GatedMLP], windows: Sequence[list[int]]
) -> list[dict[str, Tensor]]:
    """Moments and factors that each method asks for, over the activations of every token of the windows.

    As the model makes them: dense, or inside an `attach` block (so that ``mlps`` were found before it) sparse. What the
    methods have in common is made once, in two passes over the text at most.

    Returns
    -------
    list of dict
        As `Fit.extras` holds them: one tensor a name, its first dimension the layer, on the CPU; empty for a method that asks
        for nothing.

    Raises
    ------
    InputError
        A rank above d_model, or above the tokens there are.
    CellError
        NaN or infinite activations.
    """
    asking = [method for method in methods if method.needs_calibration]
    for method in asking:
        _check_ranks(method, mlps[0].d_model, sum(map(len, windows)))
    means = _means(loaded, asking, mlps, windows) if asking else {}
    _refuse_not_finite(means)  # before their eigenvectors are asked for
    wanted = {_Low(name, rank, method.predictor_input) for method in asking for name, rank in method.factors.items()}
    factors = _factors(loaded, sorted(wanted), mlps, windows, means) if wanted else {}
    found = []
    for method in methods:
        extras = {f"moments.{name}": means[f"moments.{name}"] for name in method.moments}
        for name, rank in method.factors.items():
            one = factors[_Low(name, rank, method.predictor_input)]
            extras |= {f"factor.{name}.{part}": stacked for part, stacked in one.items()}
        _refuse_not_finite(extras)
        found.append(extras)
    return found


class _Low(NamedTuple):
    """An approximation of a projection by a low rank of what it reads."""

    name: Projection
    rank: int
    reads: PredictorInput


def _refuse_not_finite(found: Mapping[str, Tensor]) -> None:
    for name, stacked in found.items():
        for layer, values in enumerate(stacked):
            if not bool(values.isfinite().all()):
                raise CellError(f"{name} of layer {layer} is NaN or infinite on the calibration text")


def _check_ranks(method: Method, d_model: int, n_tokens: int) -> None:
    for name, rank in method.factors.items():
        what = f"method {method.name}: rank {rank} of its factor of {name!r}"
        if not 1 <= rank <= d_model:
            raise InputError(f"{what} must be 1 to d_model={d_model}")
        if rank > n_tokens:
            raise InputError(f"{what} is more than the {n_tokens} tokens it is fitted on: give more calibration text")


def _means(
    loaded: LoadedModel, methods: Sequence[Method], mlps: Sequence[GatedMLP], windows: Sequence[list[int]]
) -> dict[str, Tensor]:
    """Mean squares by quantity, and where factors are asked for ``gram.mlp``, E x x^T, (n_layers, d_model, d_model).

    Of factors that read the block's input h: ``gram.block``, E h h^T, and ``cross``, E x h^T.
    """
    n_tokens = sum(map(len, windows))
    reads = {method.predictor_input for method in methods if method.factors}
    products = [("gram.mlp", "input", "input")] if "mlp" in reads else []
    products += [("gram.block", "block", "block"), ("cross", "input", "block")] if "block" in reads else []
    sums: dict[str, dict[int, Tensor]] = {f"moments.{name}": {} for method in methods for name in method.moments}
    sums |= {name: {} for name, _, _ in products}

    def see(mlp: GatedMLP, made: Activations) -> None:
        def add(name: str, part: Tensor) -> None:
            layers = sums[name]
            layers[mlp.layer] = layers[mlp.layer] + part if mlp.layer in layers else part

        for name in sums.keys() - {name for name, _, _ in products}:
            add(name, getattr(made, name.removeprefix("moments.")).float().square().sum(0).double())
        for name, first, second in products:
            add(name, getattr(made, first).float().T @ getattr(made, second).float())

    of_block = any(method.predictor_input == "block" for method in methods)
    _watch(loaded, mlps, windows, see, block=of_block)
    return {
        name: torch.stack([layers[layer] / n_tokens for layer in sorted(layers)]).float().cpu()
        for name, layers in sums.items()
    }


def _factors(
    loaded: LoadedModel,
    wanted: Sequence[_Low],
    mlps: Sequence[GatedMLP],
    windows: Sequence[list[int]],
    means: Mapping[str, Tensor],
) -> dict[_Low, dict[str, Tensor]]:
    made: dict[_Low, list[Factor]] = {}
    for one in wanted:
        gram, cross = means[f"gram.{one.reads}"], means["cross"] if one.reads == "block" else None
        made[one] = [
            low_rank(weight, gram[mlp.layer], one.rank, None if cross is None else cross[mlp.layer])
            for mlp in mlps
            for weight in [mlp.weights()[0 if one.name == "gate" else 1]]
        ]
    missed = {one: torch.zeros(len(mlps), mlps[0].d_ff, dtype=torch.float64) for one in made}

    def see(mlp: GatedMLP, activations: Activations) -> None:
        for one, factors in made.items():
            guess = factors[mlp.layer].apply(activations.block if one.reads == "block" else activations.input)
            if one.name == "gate":
                error = activations.act.float() - mlp.act(guess)
            else:
                error = activations.up.float() - guess
            missed[one][mlp.layer] += error.double().square().sum(0).cpu()

    _watch(loaded, mlps, windows, see, block=any(one.reads == "block" for one in made))
    n_tokens = sum(map(len, windows))
    return {
        one: {
            "v": torch.stack([factor.v for factor in factors]).cpu(),
            "u": torch.stack([factor.u for factor in factors]).cpu(),
            "residual": (missed[one] / n_tokens).float(),
        }
        for one, factors in made.items()
    }


def low_rank(weight: Tensor, gram: Tensor, rank: int, cross: Tensor | None = None) -> Factor:
    """The best approximation of a projection by a rank on inputs of second moments ``gram``; its residual is left 0.

    With ``C = gram + 1e-4 mean(diag(gram)) I = L L^T`` and ``svd(W L) = U S Z^T`` it is ``(U_r S_r) (Z_r^T L^-1)``, the same
    for every such L. Here L is from the eigenvectors of gram, whose eigenvalues rounding can make negative; a Cholesky
    factorisation would fail then. Of another vector h that stands for the input x it is the reduced-rank regression of
    W x on h: ``W (E x h^T) C^-1`` takes the place of W, C is of h.

    Parameters
    ----------
    weight : Tensor, shape (d_ff, d_model)
    gram : Tensor, shape (d_model, d_model), fp32
        E x x^T, or E h h^T.
    cross : Tensor, shape (d_model, d_model), fp32, optional
        E x h^T.
    """
    wide, gram = weight.detach().double(), gram.double().to(weight.device)
    ridge = (_RIDGE * gram.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny)  # of inputs that are all 0
    values, vectors = torch.linalg.eigh(gram)
    scale = (values.clamp(min=0) + ridge).sqrt()
    # left singular vectors Z of (W L)^T, of the small side: (W L)^T (W L) = Z S^2 Z^T
    product = wide @ (vectors * scale if cross is None else cross.double().to(weight.device) @ (vectors / scale))
    right = torch.linalg.eigh(product.T @ product).eigenvectors[:, -rank:].flip(1)
    v = vectors @ (right / scale[:, None])
    u = product @ right
    # columns of equal length in both: V is as large as 1 / sqrt(ridge) for dead inputs, which fp16 cannot hold
    size = (u.norm(dim=0) / v.norm(dim=0)).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    v, u = v * size, u / size
    return Factor(v.to(weight.dtype), u.to(weight.dtype), torch.zeros(len(weight), device=weight.device))


def _watch(
    loaded: LoadedModel, mlps: Sequence[GatedMLP], windows: Sequence[list[int]], see: See, *, block: bool
) -> None:
    """Show every layer's activations of all tokens of the windows, chunk by chunk, those of its block too if asked for."""
    valid = torch.empty(0)
    normed: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Any, Any, Tensor], None]:
        return lambda _module, _args, output: normed.update({layer: output})

    def hook(mlp: GatedMLP) -> Callable[[Any, tuple[Any, ...]], None]:
        def show(_module: Any, args: tuple[Any, ...]) -> None:
            seen = normed.pop(mlp.layer)[valid] if block else None
            see(mlp, mlp.activations(args[0][valid], block=seen))

        return show

    with ExitStack() as undo, torch.inference_mode():
        for mlp in mlps:
            undo.callback(mlp.module.register_forward_pre_hook(hook(mlp)).remove)
            if block:
                undo.callback(block_norm(loaded.model, mlp).register_forward_hook(keep(mlp.layer)).remove)
        for ids, mask in batches(windows, _CHUNK):
            mask = mask.to(loaded.device)
            valid = mask.bool()
            # logits of one position: those of all would take 0.8 GB
            loaded.model(input_ids=ids.to(loaded.device), attention_mask=mask, use_cache=False, logits_to_keep=1)
