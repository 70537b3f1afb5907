"""What a launch of a choosing layer left in its workspace: the active neurons, and how many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels_numba.gpu.plan import Plan

_NEURON = (1 << 24) - 1


def _areas(plan: Plan, workspace: Tensor) -> tuple[Tensor, Tensor]:
    """Entries found by each block, (n_blocks,) int32, and the list of entries, (d_ff,) int32: neuron + token bits << 24."""
    at = plan.workspace["counts"]
    counts = workspace[at : at + plan.n_blocks * 8].view(torch.int32)[::2]
    at = plan.workspace["index"]
    return counts, workspace[at : at + plan.d_ff * 4].view(torch.int32)


def _used(plan: Plan, counts: Tensor) -> Tensor:
    """Which places of the list hold an entry of the last launch, shape (..., d_ff), from counts (..., n_blocks)."""
    rows, spare = divmod(plan.d_ff, plan.n_blocks)
    blocks = torch.arange(plan.n_blocks, device=counts.device)
    starts = blocks * rows + blocks.clamp(max=spare)
    places = torch.arange(plan.d_ff, device=counts.device)
    owner = torch.searchsorted(starts, places, right=True) - 1
    return (places - starts[owner]) < (counts & 0xFFFF)[..., owner]


def active_neurons(plan: Plan, workspace: Tensor, token: int) -> Tensor:
    """Neurons of a token, ascending, int64; waits for the device."""
    counts, entries = _areas(plan, workspace)
    found = entries[_used(plan, counts)].long()
    return (found[(found >> (24 + token)) & 1 == 1] & _NEURON).sort().values


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
    areas = [_areas(*layer.last_launch) for layer in layers]
    plan = layers[0].last_launch[0]
    counts = torch.stack([counts for counts, _ in areas])
    if n_tokens == 1:
        return (counts & 0xFFFF).sum(-1, keepdim=True)
    entries = torch.stack([entries for _, entries in areas])
    shifts = torch.arange(24, 24 + n_tokens, device=entries.device)
    used = (entries[..., None] >> shifts) & 1
    return (used * _used(plan, counts)[..., None]).sum(-2)
