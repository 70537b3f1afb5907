"""Sparse gated MLP layers on a CUDA device, for the few tokens of a decode step.

    layer = ThresholdLayer(w_gate, w_up, transpose_down(w_down), activation="silu", first="up", threshold=0.8)
    y = layer(x)             # x (..., d_model) of at most 8 tokens

Weights are bound without a copy: their addresses are laid out for the driver once. Nothing waits for the device and
nothing is allocated beside the output, so a call can be captured in a CUDA graph; counts stay on the device. A layer's
workspace serves one stream at a time. NaN in x gives NaN in y.

All layers but `ThresholdLayer` add in an order that depends on the active set alone: equal inputs give equal bits. A
`ThresholdLayer` does so with ``deterministic=True``, and for more than 2 tokens; else its blocks claim rows as they come to
them, and the order of its fp32 sums, so the last bits of y, vary from call to call.

Batch 2 to 8: rows are read for the union of the tokens' active sets, and each token uses only its own neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from kernels_numba.checks import check_apart, checked_threshold
from kernels_numba.gpu.host.active_set import active_neurons
from kernels_numba.gpu.host.checks import NAMES, check_factors, check_list, check_range, check_weight, unavailable
from kernels_numba.gpu.host.jit import Launch, Loaded, load_kernel
from kernels_numba.gpu.host.tuning import device_facts, launch_tokens, tuned_plan
from kernels_numba.gpu.mlp.plan import MAX_BATCH, STAMPS, TRACED, Kind, Plan, Quantity


def transpose_down(w_down: Tensor, *, keep_dense: bool = True) -> Tensor:
    """Contiguous transposed copy (d_ff, d_model) of ``w_down`` (d_model, d_ff).

    ``keep_dense=False`` makes ``w_down`` itself a view of the copy and frees its own memory: dense passes still work
    (the values are the same, the layout is not), and the layer needs no more memory than a dense one.
    """
    copy = w_down.detach().t().contiguous()
    if not keep_dense:
        w_down.data = copy.t()
    return copy


class Layer:
    """Plans, launches and workspaces of one layer; one launch object for each batch size used."""

    kind: Kind

    def __init__(
        self,
        w_down_t: Tensor,
        activation: str,
        *,
        rank: int = 0,
        first: Literal["gate", "up"] = "up",
        deterministic: bool = False,
        scaled: bool = False,
        predicted: tuple[tuple[Quantity, int], ...] = (),
    ) -> None:
        if not isinstance(w_down_t, Tensor) or w_down_t.dim() != 2:
            raise ValueError("w_down_t must be a matrix (d_ff, d_model): pass transpose_down(w_down)")
        check_weight("w_down_t", w_down_t, tuple(w_down_t.shape), None)
        reason = unavailable(w_down_t.device)
        if reason:
            raise RuntimeError(reason)
        self.w_down_t, self.device, self.dtype = w_down_t, w_down_t.device, w_down_t.dtype
        self.d_ff, self.d_model = w_down_t.shape
        self._n_blocks, self._capability = device_facts(self.device)
        self._changes: dict[str, Any] = {}
        self._options: dict[str, Any] = {
            "activation": activation, "rank": rank, "first": first, "deterministic": deterministic, "scaled": scaled,
            "predicted": predicted,
        }  # fmt: skip
        self._addresses: dict[str, int | float] = {"down": w_down_t.data_ptr()}
        self._launches: dict[int, tuple[Loaded, Launch, Tensor]] = {}
        self._most = launch_tokens(self._plan(1))
        self._last = 1
        self._record: list[tuple[Loaded, dict[str, int | float]]] | None = None

    def bind(self, *arguments: Any, **named: Any) -> Callable[[], None]:
        """Call the layer once, then return a function that launches it again on the same tensors.

        Nothing is checked or laid out again: about 6 us of host time. The caller keeps the tensors (``out`` among them)
        alive and in place; the function launches on the current stream.
        """
        self._record = []
        try:
            self.__call__(*arguments, **named)  # type: ignore[operator]
            launches = [Launch(loaded, values) for loaded, values in self._record]
        finally:
            self._record = None
        device, current = self.device, torch.cuda.current_stream

        def again() -> None:
            stream = current(device).cuda_stream
            for launch in launches:
                launch(stream)

        return again

    def _plan(self, batch: int) -> Plan:
        plan = tuned_plan(
            self.kind, self.d_model, self.d_ff, NAMES[self.dtype], batch=batch, n_blocks=self._n_blocks,
            capability=self._capability, **self._options,
        )  # fmt: skip
        return replace(plan, **self._changes).check()

    def change_plan(self, **changes: Any) -> None:
        """Launch other kernels from now on: fields of `Plan` in place of the tuned ones, to measure what they cost."""
        self._changes = changes
        self._launches.clear()

    def phases(self) -> dict[str, Tensor]:
        """Clock cycles that each block's first thread spent in each phase of the last launch, of a plan with ``trace``.

        Returns
        -------
        dict of Tensor, shape (n_blocks,), int64
        """
        plan, workspace = self.last_launch
        if not plan.trace:
            raise ValueError("trace is off: change_plan(trace=True) before the launch")
        at = plan.workspace.trace
        stamps = workspace[at : at + plan.n_blocks * len(STAMPS) * 8].view(torch.int64).view(plan.n_blocks, len(STAMPS))
        return {
            name: stamps[:, STAMPS.index(end)] - stamps[:, STAMPS.index(begin)]
            for name, begin, end in TRACED[self.kind]
        }

    def _launch(self, batch: int) -> tuple[Loaded, Launch, Tensor]:
        if batch not in self._launches:
            loaded = load_kernel(self._plan(batch), self.device.index or 0)
            workspace = torch.zeros(loaded.plan.workspace.total, dtype=torch.uint8, device=self.device)
            launch = Launch(loaded, self._addresses | {"workspace": workspace.data_ptr()})
            self._launches[batch] = loaded, launch, workspace
        return self._launches[batch]

    def prepare(self, n_tokens: int = 1) -> Loaded:
        """Compile and load what ``n_tokens`` need; a call does it too, but not while a graph is captured."""
        return self._launch(self._batch(n_tokens))[0]

    def plan(self, n_tokens: int = 1) -> Plan:
        """Plan of the launches of a call with ``n_tokens``."""
        return self._plan(self._batch(n_tokens))

    def _batch(self, n_tokens: int) -> int:
        """Tokens that a launch is compiled for: a power of 2."""
        return int(1 << (min(n_tokens, self._most) - 1).bit_length())

    @property
    def launch_tokens(self) -> int:
        """Most tokens of one launch; a call with more makes several."""
        return self._most

    @property
    def last_launch(self) -> tuple[Plan, Tensor]:
        """Plan and workspace of the last launch."""
        loaded, _, workspace = self._launch(self._last)
        return loaded.plan, workspace

    @property
    def workspace_bytes(self) -> int:
        """Device memory of the workspaces made so far."""
        return sum(workspace.numel() for _, _, workspace in self._launches.values())

    @property
    def extra_bytes(self) -> int:
        """Memory beyond the dense layer's, if W_down is kept beside its transposed copy: that copy and the workspaces."""
        return self.w_down_t.numel() * self.w_down_t.element_size() + self.workspace_bytes

    def _tokens(self, name: str, value: Tensor, shape: tuple[int, ...] | None = None) -> int:
        if value.dtype != self.dtype or value.device != self.device:
            raise ValueError(f"{name} is {value.dtype} on {value.device}: the layer is {self.dtype} on {self.device}")
        if not value.dim() or value.shape[-1] != self.d_model or (shape is not None and tuple(value.shape) != shape):
            wanted = f"(..., {self.d_model})" if shape is None else str(shape)
            raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {wanted}")
        if not value.is_contiguous() or value.data_ptr() % 16:
            raise ValueError(f"{name} is not contiguous from a multiple of 16 bytes on: call contiguous() or clone()")
        n_tokens = value.numel() // self.d_model
        if not 1 <= n_tokens <= MAX_BATCH:
            raise ValueError(f"{name} holds {n_tokens} tokens: the kernels take 1 to {MAX_BATCH}; use the dense layer")
        return n_tokens

    def _run(self, x: Tensor, out: Tensor | None, residual: Tensor | None, **arguments: int) -> Tensor:
        n_tokens = self._tokens("x", x)
        if out is None:
            out = torch.empty_like(x)
        else:
            self._tokens("out", out, tuple(x.shape))
            check_apart(extent(out), extent(x), "x")
        if residual is not None:
            self._tokens("residual", residual, tuple(x.shape))
            check_apart(extent(out), extent(residual), "residual")
        self._go(n_tokens, x.data_ptr(), out, residual, arguments)
        return out

    def _go(self, n_tokens: int, x: int, out: Tensor, residual: Tensor | None, arguments: dict[str, int]) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        row = self.d_model * out.element_size()
        for begin in range(0, n_tokens, self._most):
            now = min(self._most, n_tokens - begin)
            self._last = 1 << (now - 1).bit_length()
            loaded, launch, _ = self._launch(self._last)
            launch.set("n_tokens", now)
            launch.set("x", x + begin * row if x else 0)
            launch.set("y", out.data_ptr() + begin * row)
            launch.set("residual", residual.data_ptr() + begin * row if residual is not None else 0)
            for name, value in arguments.items():
                launch.set(name, value)
            launch(stream)
            if self._record is not None:
                self._record.append((loaded, launch.values()))


def extent(value: Tensor) -> tuple[int, int]:
    """Address and size in bytes of a contiguous tensor."""
    return value.data_ptr(), value.numel() * value.element_size()


class ChoosingLayer(Layer):
    """A layer that finds its active neurons itself."""

    def __init__(self, w_down_t: Tensor, activation: str, threshold: float, **options: Any) -> None:
        super().__init__(w_down_t, activation, **options)
        self.threshold = threshold

    @property
    def threshold(self) -> float:
        """Neurons scoring below it are skipped; compared in fp32. A graph keeps the value it was captured with."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._threshold = checked_threshold(value)
        self._addresses["threshold"] = self._threshold
        for _, launch, _ in self._launches.values():
            launch.set("threshold", self._threshold)

    def active(self, token: int = 0) -> Tensor:
        """Neurons of a token in the last launch, ascending, int64; waits for the device."""
        return active_neurons(*self.last_launch, token)


class ThresholdLayer(ChoosingLayer):
    """CATS (``first="gate"``, score ``abs(act(g))``) and M-COUNTDOWN (``first="up"``, score ``abs(u)``).

    Parameters
    ----------
    w_gate, w_up : Tensor, shape (d_ff, d_model), bf16, fp16 or fp32, contiguous, CUDA
    w_down_t : Tensor, same
        From `transpose_down`.
    activation : "silu" or "gelu_tanh"
    first : "up" or "gate"
    threshold : float
        A neuron is kept unless its score is below it; -inf keeps all.
    scale : Tensor, shape (d_ff,), fp32, contiguous, CUDA, optional
        Factor of each neuron in its score, an fp32 product; without it the kernel is one that reads none.
    deterministic : bool
        Deal all rows out before the launch, so that equal inputs give equal bits; slower. Else a block that is ahead of
        the others claims more rows, and the last bits of y vary from call to call.

    Raises
    ------
    ValueError
        Wrong dtype, device, shape, contiguity or name, sizes that are not multiples of 8, a threshold that is NaN or not a number.
    RuntimeError
        The kernels cannot run on this machine.
    """

    kind: Kind = "threshold"

    def __init__(
        self,
        w_gate: Tensor,
        w_up: Tensor,
        w_down_t: Tensor,
        *,
        activation: str,
        first: str,
        threshold: float,
        scale: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        if first not in ("up", "gate"):
            raise ValueError(f"first={first!r}: must be 'up' (M-COUNTDOWN) or 'gate' (CATS)")
        options = {"first": first, "deterministic": deterministic, "scaled": scale is not None}
        super().__init__(w_down_t, activation, threshold, **options)
        for name, weight in (("w_gate", w_gate), ("w_up", w_up)):
            check_weight(name, weight, (self.d_ff, self.d_model), w_down_t)
        self.first, self.scale, self._weights = first, scale, (w_gate, w_up)
        if scale is not None:
            check_factors("scale", scale, self.d_ff, self.device)
            self._addresses["values"] = scale.data_ptr()
        dense, other = (w_gate, w_up) if first == "gate" else (w_up, w_gate)
        self._addresses |= {"dense": dense.data_ptr(), "a": other.data_ptr()}

    @property
    def extra_bytes(self) -> int:
        """As for all layers, and the factors."""
        return super().extra_bytes + (0 if self.scale is None else self.scale.numel() * 4)

    def __call__(self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None) -> Tensor:
        """``y`` (plus ``residual``), of the shape and dtype of ``x`` (..., d_model), at most 8 tokens."""
        return self._run(x, out, residual)


class PredictorLayer(ChoosingLayer):
    """Methods with a low-rank predictor: a neuron is active unless its logit ``(x V^T) U^T`` is below the threshold.

    Parameters as `ThresholdLayer`, and

    v : Tensor, shape (rank, d_model)
    u : Tensor, shape (d_ff, rank)
        Copied with zero columns added if ``rank`` is not a multiple of 256 (fp32: 128).
    """

    kind: Kind = "predictor"

    def __init__(
        self, w_gate: Tensor, w_up: Tensor, w_down_t: Tensor, v: Tensor, u: Tensor, *, activation: str, threshold: float
    ) -> None:
        if not isinstance(v, Tensor) or v.dim() != 2 or not v.shape[0]:
            raise ValueError("v must be a matrix (rank, d_model) with at least one row")
        rank = v.shape[0]
        super().__init__(w_down_t, activation, threshold, rank=rank)
        check_weight("v", v, (rank, self.d_model), w_down_t)
        check_weight("u", u, (self.d_ff, rank), w_down_t)
        for name, weight in (("w_gate", w_gate), ("w_up", w_up)):
            check_weight(name, weight, (self.d_ff, self.d_model), w_down_t)
        missing = self._plan(1).rank_padded - rank
        u = torch.nn.functional.pad(u, (0, missing)) if missing else u
        self._weights = (w_gate, w_up, v, u)
        self._addresses |= {k: w.data_ptr() for k, w in (("dense", v), ("u", u), ("a", w_gate), ("b", w_up))}

    @property
    def extra_bytes(self) -> int:
        """As for all layers, and the predictor."""
        return super().extra_bytes + sum(w.numel() * w.element_size() for w in self._weights[2:])

    def __call__(self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None) -> Tensor:
        """``y`` (plus ``residual``), of the shape and dtype of ``x`` (..., d_model), at most 8 tokens."""
        return self._run(x, out, residual)


class GivenLayer(Layer):
    """Gated MLP over a given active set, the same for all tokens; parameters as `ThresholdLayer`.

    ``checked=True`` looks at every index before the launch (waits for the device; for tests): without it an index out
    of range reads out of bounds.
    """

    kind: Kind = "given"

    def __init__(
        self, w_gate: Tensor, w_up: Tensor, w_down_t: Tensor, *, activation: str, checked: bool = False
    ) -> None:
        super().__init__(w_down_t, activation)
        for name, weight in (("w_gate", w_gate), ("w_up", w_up)):
            check_weight(name, weight, (self.d_ff, self.d_model), w_down_t)
        self.checked, self._weights = checked, (w_gate, w_up)
        self._addresses |= {"a": w_gate.data_ptr(), "b": w_up.data_ptr()}

    def __call__(
        self, x: Tensor, indices: Tensor, count: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None
    ) -> Tensor:
        """``y`` of the neurons ``indices[:count]``; int32 (capacity,) and int32 (1,), both on the device."""
        check_list("indices", indices, self.device)
        check_list("count", count, self.device, one=True)
        if self.checked:
            check_range(indices, count, self.d_ff)
        return self._run(x, out, residual, indices=indices.data_ptr(), count=count.data_ptr())
