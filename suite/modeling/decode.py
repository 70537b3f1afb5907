"""Kernels that skip what is dropped, for passes of a few tokens (decode steps): which there are, and what they keep."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from suite.devices import dtype_name
from suite.methods.base import (
    NEURONS,
    Activations,
    Calibrated,
    Factor,
    Method,
    Mode,
    Site,
)
from suite.modeling.gated_mlp import GatedMLP, find_gated_mlps
from suite.modeling.modes import PredictorState

if TYPE_CHECKING:
    from suite.modeling.scope import Tokens

# of the weights that there are kernels for, by device
KERNEL_DTYPES: dict[str, tuple[str, ...]] = {"cpu": ("float32",), "cuda": ("bfloat16", "float16", "float32")}
Listing = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, int | Tensor]]
# A graph replays launches on a layer's workspace and transposed W_down: who captured one may replay it as long as the
# model's own weights exist.
_captured: WeakKeyDictionary[nn.Module, list[DecodeKernels]] = WeakKeyDictionary()


class DecodeKernels(Protocol):
    """Kernels of all layers of a model.

    Attributes
    ----------
    most : int
        Tokens that a pass may have.
    """

    most: int

    def run(self, layer: int, x: Tensor, block: Tensor | None = None) -> Tensor:
        """The MLP's output, shape and dtype of x (..., d_model); ``block``, of the same shape, for a choice that reads it."""

    def kept(self, layers: Sequence[int], n_tokens: int) -> Tensor:
        """Neurons used for each token of the last pass, shape (len(layers), n_tokens), int64; does not wait."""

    def active(self, layer: int) -> Tensor:
        """Neurons used for the first token of the last pass, ascending, int64; waits."""


@runtime_checkable
class PromptKernels(DecodeKernels, Protocol):
    """Kernels whose sets are fixed by what came before a pass."""

    def gather(self, layer: int, keep: Tensor) -> None:
        """Fix the sets of the rows of a batch, (n_rows, d_ff), bool."""


class ListedKernels:
    """Kernels for one token that know their active set when they return.

    Parameters
    ----------
    layers : callables (x, block) -> (y, list of neurons, how many of the list are used), one a layer
    """

    most = 1

    def __init__(self, layers: Sequence[Listing]) -> None:
        self._layers = layers
        self._used: dict[int, tuple[Tensor, int | Tensor]] = {}

    def run(self, layer: int, x: Tensor, block: Tensor | None = None) -> Tensor:
        """As the protocol."""
        y, *self._used[layer] = self._layers[layer](x, block)  # type: ignore[assignment]
        return y

    def kept(self, layers: Sequence[int], n_tokens: int) -> Tensor:
        """As the protocol."""
        used = [self._used[layer][1] for layer in layers]
        return torch.stack([torch.as_tensor(n, dtype=torch.int64) for n in used])[:, None]

    def active(self, layer: int) -> Tensor:
        """As the protocol."""
        listed, count = self._used[layer]
        return listed[: int(count)].long()


class ChoosingKernels:
    """CUDA layers that find their active sets themselves: several tokens share the rows of their union.

    Parameters
    ----------
    layers : ThresholdLayer or PredictorLayer, one a layer
    factors : of factors of a low rank that read the block's input, which no kernel does: torch makes those of one token, in
        the memory of its layer's ``scale``. One a layer, their matrices in fp32
    activation : of the model where the factors approximate the gate, else None
    """

    def __init__(
        self,
        layers: Sequence[Any],
        factors: Sequence[Factor] = (),
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.layers, self._factors, self._activation = layers, factors, activation
        self.most = 1 if factors else min(layer.launch_tokens for layer in layers)

    @property
    def copies(self) -> list[Tensor]:
        """What it holds beside its layers."""
        held = [part for factor in self._factors for part in (factor.v, factor.u)]
        return [*held, *(layer.scale for layer in self.layers if self._factors)]

    def run(self, layer: int, x: Tensor, block: Tensor | None = None) -> Tensor:
        """As the protocol."""
        if self._factors and block is not None:
            token = block.reshape(1, -1)
            self.layers[layer].scale.copy_(self._factors[layer].rms(token, self._activation)[0])
        y: Tensor = self.layers[layer](x.contiguous())
        return y

    def kept(self, layers: Sequence[int], n_tokens: int) -> Tensor:
        """As the protocol: a few launches for all layers together."""
        from kernels_numba.gpu.host.active_set import active_counts

        return active_counts([self.layers[layer] for layer in layers], n_tokens)

    def active(self, layer: int) -> Tensor:
        """As the protocol."""
        found: Tensor = self.layers[layer].active()
        return found


class Fallback:
    """Decides pass by pass whether the kernels compute it, and says once if a decode step is too wide for them."""

    def __init__(self, model: nn.Module, kernels: DecodeKernels, *, steps_only: bool = False) -> None:
        self.kernels = kernels
        self._model, self._steps_only = model, steps_only
        self._said = False

    def takes(self, tokens: Tokens | None) -> bool:
        """Whether the kernels compute a pass: every token in scope, and no more than they hold; a step, if they need a prompt."""
        if tokens is None or (self._steps_only and not tokens.step):
            return False
        if not isinstance(tokens.index, slice) or tokens.index != slice(0, tokens.total):
            return False
        if tokens.total > self.kernels.most:
            if tokens.step and not self._said:
                self._said = True
                warnings.warn(
                    f"decode step of {tokens.total} rows: the kernels take up to {self.kernels.most}; "
                    "such steps are computed densely and masked",
                    stacklevel=2,
                )
            return False
        if tokens.documents.is_cuda and torch.cuda.is_current_stream_capturing():
            held = _captured.setdefault(self._model, [])
            if self.kernels not in held:
                held.append(self.kernels)
            return True
        return tokens.alive is None or bool(tokens.alive.any())


def why_not_numba(model: nn.Module, method: Method, mode: Mode, state: object) -> str:
    """Reason why the kernels cannot stand in for this method on this model; empty if they can."""
    if method.sites != (NEURONS,):
        return f"its kernels skip neurons, and {method.name} masks {' and '.join(method.sites)}"
    if mode != "practical" and not method.fixed_set:
        return f"it needs a threshold, and the mode is {mode}"
    mlps = find_gated_mlps(model)
    if reason := next(filter(None, (mlp.why_not_plain() for mlp in mlps)), ""):
        return f"its kernels compute from the weights alone, and {reason}"
    if any(mlp.has_bias() for mlp in mlps):
        return "its kernels add no bias"
    if method.fixed_set:
        return ""  # torch's own products
    weights = [weight for mlp in mlps for weight in mlp.weights()]
    devices, dtypes = {weight.device for weight in weights}, {weight.dtype for weight in weights}
    if len(devices) > 1:
        return f"the model lies on {len(devices)} devices"
    device = devices.pop()
    if device.type not in KERNEL_DTYPES:
        return f"there are kernels for cpu and cuda, the model is on {device}"
    if not {dtype_name(dtype) for dtype in dtypes} <= set(KERNEL_DTYPES[device.type]):
        return f"its kernels on {device.type} are for {', '.join(KERNEL_DTYPES[device.type])}"
    for mlp in mlps:
        if not all(weight.is_contiguous() for weight in mlp.weights()[:2]):  # W_down is transposed by a copy anyway
            return (
                f"its kernels read rows, and gate or up of {mlp.module_name} is not contiguous: call contiguous() on it"
            )
    if not isinstance(state, PredictorState) and not has_kernel(method):
        return f"its kernels do not compute the score of {method.name}"
    return _why_not_cuda(mlps[0], len(mlps), device) if device.type == "cuda" else ""


def _why_not_cuda(mlp: GatedMLP, n_layers: int, device: torch.device) -> str:
    from kernels_numba.gpu.host.checks import unavailable

    if reason := unavailable(device):
        return reason
    if mlp.d_model % 8 or mlp.d_ff % 8:
        return f"d_model={mlp.d_model} and d_ff={mlp.d_ff} must be multiples of 8"
    needed = n_layers * mlp.d_model * mlp.d_ff * mlp.weights()[2].element_size()
    spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + spare
    if needed > free:
        return f"transposed copies of W_down take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
    return ""


def has_kernel(method: Method) -> bool:
    """Whether kernels compute the score: the magnitude of a projection, times `Method.neuron_scale` or what `low_rank` says.

    Found on a sample; of a method that leaves a choice to its fit, whatever that is.
    """
    if method.candidates:
        choices = [dict(zip(method.candidates, some, strict=True)) for some in product(*method.candidates.values())]
        return all(has_kernel(replace(method, **choice)) for choice in choices)
    generator = torch.Generator().manual_seed(0)
    gate, act, up, block = (torch.randn(4, 64, generator=generator) for _ in range(4))
    magnitude = {"gate": act, "up": up}.get(method.exact_projection)
    if magnitude is None or method.needs_prompt:
        return False
    v, u = (torch.randn(64, 4, generator=generator) / 8 for _ in range(2))
    moments: dict[str, Tensor] = {name: torch.rand(64, generator=generator) for name in method.moments}
    factors: dict[str, Factor] = {name: Factor(v, u, torch.rand(64, generator=generator)) for name in method.factors}
    calibrated = Calibrated(moments=moments, factors=factors)
    low_rank, scale = method.low_rank(calibrated), method.neuron_scale(calibrated)
    if low_rank is not None:
        seen = block if method.predictor_input == "block" else gate
        scale = low_rank.rms(seen, silu if method.exact_projection == "up" else None)
    expected = magnitude.abs() if scale is None else magnitude.abs() * scale
    keys = torch.arange(4)
    values = {"input": gate, "gate": gate, "act": act, "up": up, "product": act * up, "block": block}
    site = Site(NEURONS, layer=0, width=64)
    made = Activations(
        site, values, keys, keys, norms=lambda matrix, of: torch.ones(64), act_fn=silu, calibrated=calibrated
    )
    return torch.equal(method.score(made).float(), expected)
