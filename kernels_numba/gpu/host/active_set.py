"""What a launch of a choosing layer left in its workspace: the active neurons, and how many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels_numba.gpu.mlp.plan import Plan

_NEURON = (1 << 24) - 1


def _words(plan: Plan, workspace: Tensor, area: str, n: int) -> Tensor:
    """The first ``n`` words of an area, int32."""
    at: int = getattr(plan.workspace, area)
    return workspace[at : at + n * 4].view(torch.int32)


def _counts(plan: Plan, workspace: Tensor) -> Tensor:
    """Neurons found by each block, (n_blocks,)."""
    return _words(plan, workspace, "counts", 2 * plan.n_blocks)[::2]


def _used(plan: Plan, workspace: Tensor) -> Tensor:
    """Which places of a predictor's list of entries hold one of the last launch, (d_ff,)."""
    rows, spare = divmod(plan.d_ff, plan.n_blocks)
    blocks = torch.arange(plan.n_blocks, device=workspace.device)
    starts = blocks * rows + blocks.clamp(max=spare)
    places = torch.arange(plan.d_ff, device=workspace.device)
    owner = torch.searchsorted(starts, places, right=True) - 1
    return (places - starts[owner]) < _counts(plan, workspace)[owner]


def _kept(plan: Plan, workspace: Tensor) -> tuple[Tensor | None, Tensor]:
    """Neurons and, bit t for token t, which of them keep each, both (d_ff,) int32; None: the neurons 0, 1, ... themselves."""
    if plan.kind == "threshold":
        return None, _words(plan, workspace, "kept", plan.d_ff)
    entries = _words(plan, workspace, "entries", 2 * plan.d_ff)[::2]  # neuron + token bits << 24
    return entries & _NEURON, torch.where(_used(plan, workspace), entries >> 24, 0)


def active_neurons(plan: Plan, workspace: Tensor, token: int) -> Tensor:
    """Neurons of a token, ascending, int64; waits for the device."""
    neurons, kept = _kept(plan, workspace)
    places = ((kept >> token) & 1).nonzero()[:, 0]
    return places if neurons is None else neurons[places].long().sort().values


def active_counts(layers: Sequence[Any], n_tokens: int) -> Tensor:
    """Active neurons of each token in the last launch of layers of one shape; does not wait for the device.

    Parameters
    ----------
    layers : ThresholdLayer or PredictorLayer
        Last called with ``n_tokens`` tokens, not more than ``launch_tokens``.

    Returns
    -------
    Tensor, shape (len(layers), n_tokens), int64, on the device
    """
    launches = [layer.last_launch for layer in layers]
    if n_tokens == 1:
        return torch.stack([_counts(*launch) for launch in launches]).sum(-1, keepdim=True)
    kept = torch.stack([_kept(*launch)[1] for launch in launches])
    return ((kept[..., None] >> torch.arange(n_tokens, device=kept.device)) & 1).sum(-2)
