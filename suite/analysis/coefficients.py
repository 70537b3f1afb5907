"""Coefficients of generated tokens: what D-, M-COUNTDOWN and CATS keep of them, and how they are spread over neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suite.errors import CellError, InputError
from suite.methods.base import Activations, kept_count, select_top_k
from suite.modeling.gated_mlp import GatedMLP, find_gated_mlps
from suite.modeling.loading import LoadedModel
from suite.registry import get_method

DIRECT = "d-countdown"  # its kept set D is what the two others are held against
ROWS = {"m-countdown": "cats", "cats": "m-countdown"}  # row method -> the method whose mistakes it may repair
QUANTITIES = {"abs_up": "m-countdown", "abs_act": "cats", "abs_product": DIRECT}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MASS_SPARSITIES = (0.5, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Analysis:
    """Rows of cif_caf.csv and activations.csv without their model."""

    cif_caf: list[dict[str, Any]]
    activations: list[dict[str, Any]]


def analyse(
    loaded: LoadedModel, texts: Sequence[str], *, prompt_tokens: int, new_tokens: int, sparsities: Sequence[float]
) -> Analysis:
    """Continue the texts densely and greedily, and look at the activations of the generated tokens.

    Parameters
    ----------
    texts : each gives one prompt, its first ``prompt_tokens`` tokens; shorter texts are left out
    new_tokens : generated per prompt; the end of the text is put off until then
    sparsities : each in (0, 1)

    Raises
    ------
    InputError
        No text is long enough, or the model has no gated MLPs.
    CellError
        A coefficient is not finite.
    """
    prompts = _prompts(loaded, texts, prompt_tokens)
    tokens = _generated(loaded, prompts, new_tokens)
    counts: dict[tuple[str, float], Tensor] = {}
    spread: list[dict[str, Any]] = []
    for mlp, activations in _activations(loaded, tokens, prompt_tokens):
        if not bool(activations.product.isfinite().all()):
            raise CellError(f"a coefficient in layer {mlp.layer} is not finite (NaN or inf)")
        for key, found in _confusion(activations, sparsities).items():
            counts[key] = counts.get(key, torch.zeros(6, dtype=torch.int64)) + found
        spread += _spread(activations)
    n_tokens = len(prompts) * new_tokens
    return Analysis([_rates(*key, found, n_tokens) for key, found in sorted(counts.items())], spread)


def _prompts(loaded: LoadedModel, texts: Sequence[str], prompt_tokens: int) -> Tensor:
    ids = [loaded.tokenizer(text)["input_ids"][:prompt_tokens] for text in texts]
    long_enough = [row for row in ids if len(row) == prompt_tokens]
    if not long_enough:
        raise InputError(f"analysis: none of {len(texts)} texts has {prompt_tokens} tokens; lower prompt_tokens")
    return torch.tensor(long_enough, device=loaded.device)


@torch.inference_mode()
def _generated(loaded: LoadedModel, prompts: Tensor, new_tokens: int) -> Tensor:
    """Prompts with their greedy continuation, shape (n_prompts, prompt_tokens + new_tokens)."""
    found: Tensor = loaded.model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )
    return found


@torch.inference_mode()
def _activations(loaded: LoadedModel, tokens: Tensor, start: int) -> Iterator[tuple[GatedMLP, Activations]]:
    """Dense activations of every layer at the positions from ``start``; all layers' inputs are kept: 2 MB a layer."""
    mlps = find_gated_mlps(loaded.model)
    inputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_module: Any, args: tuple[Tensor, ...]) -> None:
            inputs[layer] = args[0][:, start:].flatten(0, 1)

        return hook

    with ExitStack() as stack:
        for mlp in mlps:
            stack.callback(mlp.module.register_forward_pre_hook(keep(mlp.layer)).remove)
        loaded.model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    for mlp in mlps:
        yield mlp, mlp.activations(inputs.pop(mlp.layer))


def _kept(activations: Activations, scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    k = kept_count(activations.up.shape[-1], sparsity)
    return {name: select_top_k(score, k) for name, score in scores.items()}


def _confusion(activations: Activations, sparsities: Sequence[float]) -> dict[tuple[str, float], Tensor]:
    """Counts over tokens and neurons by (row method, sparsity), int64, in the order that :func:`_rates` takes."""
    scores = {name: get_method(name).score(activations) for name in (DIRECT, *ROWS)}
    found = {}
    for sparsity in sparsities:
        kept = _kept(activations, scores, sparsity)
        direct = kept[DIRECT]
        for row, other in ROWS.items():
            missed, wasted = direct & ~kept[other], ~direct & kept[other]
            parts = (direct, ~direct, missed, wasted, missed & kept[row], wasted & ~kept[row])
            found[row, sparsity] = torch.stack([part.sum() for part in parts]).cpu()
    return found


def _rates(row: str, sparsity: float, counts: Tensor, n_tokens: int) -> dict[str, Any]:
    """Row of cif_caf.csv.

    For row method M: ``cif_alive = |D & ~C| / |D|``, ``cif_dead = |~D & C| / |~D|``,
    ``caf_alive = |D & ~C & M| / |D|``, ``caf_dead = |~D & C & ~M| / |~D|``; row cats swaps C and M.
    """
    alive, dead, missed, wasted, repaired, spared = (int(count) for count in counts)
    return {
        "row_method": row,
        "sparsity": sparsity,
        "cif_alive": missed / alive,
        "cif_dead": wasted / dead if dead else None,
        "caf_alive": repaired / alive,
        "caf_dead": spared / dead if dead else None,
        "n_tokens": n_tokens,
    }


def _spread(activations: Activations) -> list[dict[str, Any]]:
    """Rows of activations.csv of one layer: mean and quantiles over tokens and neurons, and what a ranking keeps of v.

    ``mass_kept_at_80``: share of the sum of v^2 over the neurons that the ranking keeps at sparsity .8, mean over tokens.
    """
    squares = activations.product.double().square()
    total = squares.sum(-1)
    rows = []
    for quantity, method in QUANTITIES.items():
        score = get_method(method).score(activations).float()
        values = score.cpu().numpy()
        row: dict[str, Any] = {"layer": activations.site.layer, "quantity": quantity, "mean": float(values.mean())}
        for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True):
            row[f"q{100 * q:02.0f}"] = float(value)
        for sparsity in MASS_SPARSITIES:
            keep = select_top_k(score, kept_count(score.shape[-1], sparsity))
            share = (squares * keep).sum(-1)[total > 0] / total[total > 0]
            row[f"mass_kept_at_{100 * sparsity:.0f}"] = float(share.mean()) if len(share) else None
        rows.append(row | {"n_tokens": len(score)})
    return rows
