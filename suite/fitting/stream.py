"""Inputs of the MLPs as the model makes them, a few layers at a time within a memory budget; nothing goes to disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from suite.errors import CellError
from suite.fitting.windows import batches
from suite.methods.base import Method
from suite.modeling.gated_mlp import GatedMLP, block_norm

# Tokens of one forward pass.
_CHUNK = {"cpu": 2048, "cuda": 16384}


class _LayersDone(Exception):  # noqa: N818  no error: ends a forward pass after the last layer that is wanted
    pass


def mlp_inputs(
    model: nn.Module, mlps: Sequence[GatedMLP], windows: Sequence[list[int]], *, of_block: bool = False
) -> Tensor:
    """Inputs of some layers' MLPs, or of their blocks behind the first norm, for every token of the windows, in order.

    Parameters
    ----------
    model : nn.Module
        As it is: dense, or inside an `attach` block, whose sparse layers then make the inputs of later ones.
    mlps : their layers in ascending order

    Returns
    -------
    Tensor, shape (len(mlps), n_tokens, d_model), the model's dtype and device

    Raises
    ------
    CellError
        NaN or infinite inputs.
    """
    weight = mlps[0].weights()[2]
    n_tokens = sum(map(len, windows))
    inputs = torch.empty(len(mlps), n_tokens, mlps[0].d_model, dtype=weight.dtype, device=weight.device)
    at, mask = 0, torch.empty(0)

    def keep(slot: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], *output: Tensor) -> None:
            x = (output or args)[0][mask]
            inputs[slot, at : at + len(x)] = x
            if slot == len(mlps) - 1:
                raise _LayersDone

        return hook

    with ExitStack() as undo, torch.inference_mode():
        for slot, mlp in enumerate(mlps):
            if of_block:
                undo.callback(block_norm(model, mlp).register_forward_hook(keep(slot)).remove)
            else:
                undo.callback(mlp.module.register_forward_pre_hook(keep(slot)).remove)
        for ids, valid in batches(windows, _CHUNK[weight.device.type]):
            mask = valid.to(weight.device).bool()
            try:
                model(input_ids=ids.to(weight.device), attention_mask=valid.to(weight.device), use_cache=False)
            except _LayersDone:
                at += int(valid.sum())
    for slot, mlp in enumerate(mlps):
        if not bool(inputs[slot].isfinite().all()):
            raise CellError(f"inputs of layer {mlp.layer} are NaN or infinite on the calibration text")
    return inputs


def method_scores(mlps: Sequence[GatedMLP], methods: Sequence[Method], inputs: Tensor) -> list[Tensor]:
    """Scores of every method, each of shape (n_layers, n_tokens, d_ff) in the dtype of the inputs."""
    shape = (*inputs.shape[:2], mlps[0].d_ff)
    scores = [torch.empty(shape, dtype=inputs.dtype, device=inputs.device) for _ in methods]
    step = _CHUNK[inputs.device.type]
    with torch.inference_mode():
        for slot, mlp in enumerate(mlps):
            for start in range(0, inputs.shape[1], step):
                made = mlp.activations(inputs[slot, start : start + step])
                for score, method in zip(scores, methods, strict=True):
                    score[slot, start : start + step] = method.score(made)
    return scores
