"""Kernels that skip what is dropped, for passes of a few tokens (decode steps): which there are, and what they keep."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from suite.devices import dtype_name
from suite.methods.base import NEURONS, Activations, Calibrated, Method, Mode, Site, select_threshold
from suite.modeling.gated_mlp import GatedMLP, find_gated_mlps
from suite.modeling.modes import PredictorState

if TYPE_CHECKING:
    from kernels_numba.reference import Gated
    from suite.modeling.scope import Tokens

# of the weights that there are kernels for, by device
KERNEL_DTYPES: dict[str, tuple[str, ...]] = {"cpu": ("float32",), "cuda": ("bfloat16", "float16", "float32")}
Listing = Callable[[Tensor], tuple[Tensor, Tensor, int | Tensor]]
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

    def run(self, layer: int, x: Tensor) -> Tensor:
        """The MLP's output, shape and dtype of x (..., d_model)."""

    def kept(self, layers: Sequence[int], n_tokens: int) -> Tensor:
        """Neurons used for each token of the last pass, shape (len(layers), n_tokens), int64; does not wait."""

    def active(self, layer: int) -> Tensor:
        """Neurons used for the first token of the last pass, ascending, int64; waits."""


class ListedKernels:
    """Kernels for one token that know their active set when they return.

    Parameters
    ----------
    layers : callables x -> (y, list of neurons, how many of the list are used), one a layer
    """

    most = 1

    def __init__(self, layers: Sequence[Listing]) -> None:
        self._layers = layers
        self._used: dict[int, tuple[Tensor, int | Tensor]] = {}

    def run(self, layer: int, x: Tensor) -> Tensor:
        """As the protocol."""
        y, *self._used[layer] = self._layers[layer](x)  # type: ignore[assignment]
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
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.most = min(layer.launch_tokens for layer in layers)

    def run(self, layer: int, x: Tensor) -> Tensor:
        """As the protocol."""
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

    def __init__(self, model: nn.Module, kernels: DecodeKernels) -> None:
        self.kernels = kernels
        self._model = model
        self._said = False

    def takes(self, tokens: Tokens | None) -> bool:
        """Whether the kernels compute a pass: every token in scope, and no more than they hold."""
        if tokens is None or not isinstance(tokens.index, slice) or tokens.index != slice(0, tokens.total):
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
    if mode != "practical":
        return f"it needs a threshold, and the mode is {mode}"
    if (state.predictor_input if isinstance(state, PredictorState) else method.predictor_input) != "mlp":
        return "its kernels read the input of the MLP, and the predictor reads that of the block"
    mlps = find_gated_mlps(model)
    weights = [weight for mlp in mlps for weight in mlp.weights()]
    devices, dtypes = {weight.device for weight in weights}, {weight.dtype for weight in weights}
    if len(devices) > 1:
        return f"the model lies on {len(devices)} devices"
    device = devices.pop()
    if device.type not in KERNEL_DTYPES:
        return f"there are kernels for cpu and cuda, the model is on {device}"
    if not {dtype_name(dtype) for dtype in dtypes} <= set(KERNEL_DTYPES[device.type]):
        return f"its kernels on {device.type} are for {', '.join(KERNEL_DTYPES[device.type])}"
    if reason := next(filter(None, (mlp.why_not_plain() for mlp in mlps)), ""):
        return f"its kernels compute from the weights alone, and {reason}"
    if any(mlp.has_bias() for mlp in mlps):
        return "its kernels add no bias"
    for mlp in mlps:
        if not all(weight.is_contiguous() for weight in mlp.weights()[:2]):  # W_down is transposed by a copy anyway
            return (
                f"its kernels read rows, and gate or up of {mlp.module_name} is not contiguous: call contiguous() on it"
            )
    if not isinstance(state, PredictorState) and not is_magnitude(method):
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


def is_magnitude(method: Method) -> bool:
    """Whether the score is the magnitude of the first projection, times `Method.neuron_scale` if it has one, on a sample."""
    generator = torch.Generator().manual_seed(0)
    gate, act, up = (torch.randn(4, 64, generator=generator) for _ in range(3))
    magnitude = {"gate": act, "up": up}.get(method.first_projection or "")
    if magnitude is None or method.factors or method.needs_prompt:
        return False
    calibrated = Calibrated(moments={name: torch.rand(64, generator=generator) for name in method.moments})
    scale = method.neuron_scale(calibrated)
    expected = magnitude.abs() if scale is None else magnitude.abs() * scale
    keys = torch.arange(4)
    values = {"input": gate, "gate": gate, "act": act, "up": up, "product": act * up}
    site = Site(NEURONS, layer=0, width=64)
    made = Activations(
        site, values, keys, keys, norms=lambda matrix, of: torch.ones(64), act_fn=silu, calibrated=calibrated
    )
    return torch.equal(method.score(made).float(), expected)


def decode_kernels(
    model: nn.Module,
    method: Method,
    thresholds: Tensor,
    predictor: PredictorState | None,
    *,
    calibrated: Sequence[Calibrated] | None = None,
    deterministic: bool = False,
) -> DecodeKernels:
    """Kernels of every layer; each holds a transposed copy of its layer's ``W_down``.

    ``calibrated``, what the fit knows of each layer, is what the factors of neurons come from.
    """
    mlps, values = find_gated_mlps(model), thresholds.tolist()
    scales = [method.neuron_scale(known) for known in calibrated] if calibrated else [None] * len(mlps)
    on_cuda = mlps[0].weights()[2].is_cuda
    if predictor is not None and not (on_cuda and chooses_on_cuda(predictor)):
        given = _cuda_given if on_cuda else _cpu_given
        return ListedKernels([given(mlp, predictor, value) for mlp, value in zip(mlps, values, strict=True)])
    first = method.first_projection or ""
    if on_cuda:
        return ChoosingKernels(cuda_layers(mlps, first, values, predictor, scales, deterministic=deterministic))
    triples = zip(mlps, values, scales, strict=True)
    return ListedKernels([_cpu_threshold(mlp, first, value, scale) for mlp, value, scale in triples])


def _cpu_threads() -> int:
    import numba  # late: 1 s, and only this backend needs it

    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)


def _cpu_threshold(mlp: GatedMLP, first: str, threshold: float, scale: Tensor | None) -> Listing:
    from kernels_numba.cpu import ThresholdLayer, transpose_down

    w_gate, w_up, w_down = (weight.detach() for weight in mlp.weights())
    layer = ThresholdLayer(
        w_gate,
        w_up,
        transpose_down(w_down),
        activation=mlp.activation,
        first=first,
        threshold=threshold,
        scale=scale,
        threads=_cpu_threads(),
    )

    def run(x: Tensor) -> tuple[Tensor, Tensor, int]:
        y = layer(x)
        return y, torch.from_numpy(layer.active), layer.count

    return run


def _cpu_given(mlp: GatedMLP, predictor: PredictorState, threshold: float) -> Listing:
    """The predictor in torch, as the masked backend computes it, then the kernel for a given set."""
    from kernels_numba.cpu import GivenLayer, transpose_down

    w_gate, w_up, w_down = (weight.detach() for weight in mlp.weights())
    layer = GivenLayer(w_gate, w_up, transpose_down(w_down), activation=mlp.activation, threads=_cpu_threads())

    def run(x: Tensor) -> tuple[Tensor, Tensor, int]:
        keep = select_threshold(predictor.logits(mlp.layer, x.reshape(1, -1)), threshold)
        listed = keep[0].nonzero()[:, 0]
        return layer(x, listed), listed, layer.count

    return run


def _cuda_given(mlp: GatedMLP, predictor: PredictorState, threshold: float) -> Listing:
    """The same on a GPU, for predictors that have no kernel of their own; the count stays on the device."""
    from kernels_numba.gpu.host.layers import GivenLayer, transpose_down

    w_gate, w_up, w_down = (weight.detach() for weight in mlp.weights())
    layer = GivenLayer(w_gate, w_up, transpose_down(w_down), activation=mlp.activation)

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keep = select_threshold(predictor.logits(mlp.layer, x.reshape(1, -1)), threshold)[0]
        listed = torch.nonzero_static(keep, size=mlp.d_ff, fill_value=0)[:, 0].int()
        count = keep.sum(dtype=torch.int32)
        return layer(x.contiguous(), listed, count.reshape(1)), listed, count

    return run


def chooses_on_cuda(predictor: PredictorState) -> bool:
    """Whether a CUDA kernel computes the logits too: of low-rank matrices, and of a gated predictor with one part a projection."""
    predicted = getattr(predictor, "predicted", ())
    return bool(getattr(predictor, "v", None)) and not {"gate", "act"} <= set(predicted)


def gated_parts(predictor: Any, layer: int, dtype: torch.dtype) -> Gated:
    """A layer of a gated predictor as its kernel takes it."""
    from kernels_numba.reference import Gated, LowRank

    named = predictor.predicted
    v, u, residual = predictor.v[layer].to(dtype).chunk(len(named), 1), predictor.u[layer].to(dtype), predictor.residual
    parts = {name: LowRank(v[j], u[j], residual[layer][j]) for j, name in enumerate(named)}
    return Gated(parts.get("act", parts.get("gate")), parts.get("up"), act="act" in parts)


def cuda_layers(
    mlps: Sequence[GatedMLP],
    first: str,
    thresholds: Sequence[float],
    predictor: PredictorState | None,
    scales: Sequence[Tensor | None],
    *,
    deterministic: bool = False,
) -> list[Any]:
    """CUDA layers that find their active sets themselves: a predictor's, else the first projection's."""
    from kernels_numba.gpu.host.gated import GatedPredictorLayer
    from kernels_numba.gpu.host.layers import PredictorLayer, ThresholdLayer, transpose_down

    layers: list[Any] = []
    for mlp, threshold, scale in zip(mlps, thresholds, scales, strict=True):
        w_gate, w_up, w_down = (weight.detach() for weight in mlp.weights())
        weights = (w_gate, w_up, transpose_down(w_down))
        if predictor is None:
            options: dict[str, Any] = {"first": first, "scale": scale, "deterministic": deterministic}
            layers.append(ThresholdLayer(*weights, activation=mlp.activation, threshold=threshold, **options))
            continue
        if getattr(predictor, "predicted", ()):
            gated = gated_parts(predictor, mlp.layer, w_up.dtype)
            layers.append(GatedPredictorLayer(*weights, gated, activation=mlp.activation, threshold=threshold))
            continue
        v, u = predictor.v[mlp.layer], predictor.u[mlp.layer]  # type: ignore[attr-defined]
        v, u = v.T.to(w_up.dtype).contiguous(), u.to(w_up.dtype).contiguous()
        layers.append(PredictorLayer(*weights, v, u, activation=mlp.activation, threshold=threshold))
    return layers
