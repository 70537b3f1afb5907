"""CUDA backend of the speed cases: graph replay over layers with distinct weights, each case checked against float64 first."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kernels_numba.gpu.host import checks
from kernels_numba.gpu.host import layers as kernels
from kernels_numba.gpu.host.down_proj import DownProjection
from kernels_numba.gpu.host.jit import compile_together
from kernels_numba.reference import UNIT_ROUNDOFF, wrongly_selected
from suite.devices import DTYPES, torch_dtype
from suite.methods.base import kept_count
from suite.speed.cases import Progress, Row, SpeedCase, default_threads, empty_row, needed_bytes, skipped_row
from suite.speed.gpu_timing import Timed, clock_rate, numbers_of, phase_rows, prepare, time_interleaved

_MIN_LAYERS, _MAX_LAYERS = 8, 24
_FIRST = {"cats": "gate", "m-countdown": "up"}
_VARIANTS: dict[str, dict[str, bool]] = {  # of the plan
    "no-overlap": {"overlap": False}, "deterministic": {"deterministic": True}, "trace": {"trace": True},
}  # fmt: skip
_METHODS = ("dense", "d-countdown", "given", *_FIRST)


def unavailable() -> str:
    """Reason why nothing can run here; empty if it can."""
    return checks.unavailable()


@dataclass
class LayerData:
    """Weights of one layer and the inputs it is timed with; random, as speed does not depend on the values."""

    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor
    w_down_t: Tensor
    v: Tensor
    u: Tensor
    x: Tensor
    activation: str

    @classmethod
    def random(cls, case: SpeedCase, rank: int, seed: int, index: int) -> LayerData:
        """Weights of size 1/sqrt(inputs), inputs of size 1."""
        generator = torch.Generator(device="cuda").manual_seed(seed * 1009 + index)
        dtype, d_model, d_ff = torch_dtype(case.dtype), case.d_model, case.d_ff

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device="cuda", generator=generator) * scale).to(dtype)

        down = normal(d_model, d_ff, scale=d_ff**-0.5)
        return cls(
            normal(d_ff, d_model, scale=d_model**-0.5), normal(d_ff, d_model, scale=d_model**-0.5), down,
            kernels.transpose_down(down), normal(rank, d_model, scale=d_model**-0.5), normal(d_ff, rank, scale=rank**-0.5),
            normal(case.batch_size, d_model), case.activation,
        )  # fmt: skip

    def projections(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``act(g)`` and ``u`` in float64, shape (batch, d_ff)."""
        gate = x.double() @ self.w_gate.double().T
        act = functional.silu(gate) if self.activation == "silu" else functional.gelu(gate, approximate="tanh")
        return act, x.double() @ self.w_up.double().T

    def scores(self, method: str, x: Tensor) -> Tensor:
        """What the method's threshold is set on, float64, shape (batch, d_ff)."""
        if method == "d-countdown":
            return (x.double() @ self.v.double().T) @ self.u.double().T
        act, up = self.projections(x)
        return (act if _FIRST[method] == "gate" else up).abs()

    def threshold(self, method: str, sparsity: float) -> float:
        """Half-way between the last score kept and the first dropped, over all tokens of the batch."""
        scores = self.scores(method, self.x).flatten().sort(descending=True).values
        kept = kept_count(self.w_up.shape[0], sparsity) * self.x.shape[0]
        return -math.inf if kept == len(scores) else float((scores[kept - 1] + scores[kept]) / 2)

    def dense(self, x: Tensor) -> Tensor:
        """The layer in torch's own kernels."""
        return dense_layer(x, self.w_gate, self.w_up, self.w_down, self.activation)


def dense_layer(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: str) -> Tensor:
    """``y``, shape (batch, d_model), as transformers' own modules compute it."""
    gate, up = functional.linear(x, w_gate), functional.linear(x, w_up)
    act = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    return functional.linear(act * up, w_down)


@cache
def compiled_dense() -> Callable[..., Tensor]:
    """The same through torch.compile, tuned; without its own graphs, as the case is captured in one with all layers."""
    compiled: Callable[..., Tensor] = torch.compile(dense_layer, mode="max-autotune-no-cudagraphs", dynamic=False)
    return compiled


@dataclass
class Bound:
    """A case bound to one layer: ``call(x, out)``, and for a kernel the list it was given or finds.

    ``again(x, out)`` returns a launcher with all arguments laid out.
    """

    call: Callable[[Tensor, Tensor], object]
    layer: Any = None
    listed: Tensor | None = None
    values: Tensor | None = None
    threshold: float | None = None
    again: Callable[[Tensor, Tensor], Callable[[], None]] | None = None

    def active(self, token: int) -> Tensor | None:
        """Active neurons of a token in the last call; None if dense."""
        return self.listed if self.listed is not None else self.layer.active(token) if self.layer is not None else None


def bind(case: SpeedCase, data: LayerData) -> Bound:
    """Bind a case to a layer's weights; the sparsity is set for the layer's own input."""
    bound = _bind(case, data)
    if bound.layer is not None and case.variant in _VARIANTS:
        bound.layer.change_plan(**_VARIANTS[case.variant])
    return bound


def _bind(case: SpeedCase, data: LayerData) -> Bound:
    weights, activation = (data.w_gate, data.w_up, data.w_down_t), case.activation
    if case.level == "op" or case.method == "given":
        act, up = data.projections(data.x)
        product = act * up
        listed = product[0].abs().topk(kept_count(case.d_ff, case.sparsity)).indices.sort().values.int()
        count = torch.tensor([len(listed)], dtype=torch.int32, device="cuda")
        if case.level == "op":
            if case.method == "dense":
                full = product.to(data.x.dtype)
                return Bound(lambda x, out: out.copy_(functional.linear(full, data.w_down)), values=full)
            values = product[:, listed.long()].to(data.x.dtype).contiguous()
            op = DownProjection(data.w_down_t)
            return Bound(
                lambda x, out: op(values, listed, count, out), op, listed, values,
                again=lambda x, out: op.bind(values, listed, count, out),
            )  # fmt: skip
        given = kernels.GivenLayer(*weights, activation=activation)
        return Bound(
            lambda x, out: given(x, listed, count, out), given, listed,
            again=lambda x, out: given.bind(x, listed, count, out),
        )  # fmt: skip
    if case.method == "dense":
        if case.variant == "compile":
            arguments = (data.w_gate, data.w_up, data.w_down, data.activation)
            return Bound(lambda x, out: compiled_dense()(x, *arguments))
        return Bound(lambda x, out: data.dense(x))
    threshold = data.threshold(case.method, case.sparsity)
    if case.method == "d-countdown":
        layer: Any = kernels.PredictorLayer(*weights, data.v, data.u, activation=activation, threshold=threshold)
    else:
        first = _FIRST[case.method]
        layer = kernels.ThresholdLayer(*weights, activation=activation, first=first, threshold=threshold)
    return Bound(lambda x, out: layer(x, out), layer, threshold=threshold, again=lambda x, out: layer.bind(x, out))


def _expected(case: SpeedCase, bound: Bound, data: LayerData, x: Tensor) -> tuple[Tensor, list[int], str]:
    """Float64 output on the kernel's own active set, active neurons of each token, and what is wrong with the set."""
    down = data.w_down.double()
    if case.level == "op" and bound.values is not None:
        columns = down if bound.listed is None else down[:, bound.listed.long()]
        return bound.values.double() @ columns.T, [columns.shape[1]] * len(x), ""
    act, up = data.projections(x)
    product, counts, wrong = act * up, [], ""
    scores = None if bound.threshold is None else data.scores(case.method, x)
    for token in range(len(x)):
        active = bound.active(token)
        if active is None:
            counts.append(case.d_ff)
            continue
        counts.append(len(active))
        mask = torch.zeros(case.d_ff, dtype=torch.bool, device="cuda")
        mask[active.long()] = True
        product[token] *= mask
        if scores is not None and bound.threshold is not None:
            # a projection of length d_model, or rank on top of it, rounds differently in fp32: scores close by may differ
            bad = wrongly_selected(scores[token].cpu().numpy(), active.cpu().numpy(), bound.threshold, case.d_model)
            if len(bad):
                wrong = f"check failed: {len(bad)} neurons wrongly kept or dropped, first {bad[0]}"
    return product @ down.T, counts, wrong


@dataclass
class Check:
    """Outcome of a check: error relative to the largest output, sparsity realised, seconds to compile and load."""

    error: float
    reason: str
    realised: float
    jit_s: float | None


def check(case: SpeedCase, bound: Bound, data: LayerData, seed: int) -> Check:
    """One call on a fresh input with the output poisoned with NaN, compared with float64 on the kernel's own set."""
    generator = torch.Generator(device="cuda").manual_seed(seed + 77)
    x = torch.randn(data.x.shape, device="cuda", generator=generator).to(data.x.dtype)
    out = torch.full_like(x, math.nan)
    start = time.perf_counter()
    bound.call(data.x, out)
    torch.cuda.synchronize()
    jit_s = time.perf_counter() - start if case.variant == "compile" else None
    if bound.layer is not None:
        jit_s = bound.layer.prepare(case.batch_size).jit_s
    _, counts, _ = _expected(case, bound, data, data.x)
    out.fill_(math.nan)
    result = bound.call(x, out)
    got = (result if isinstance(result, Tensor) else out).double()
    expected, _, reason = _expected(case, bound, data, x)
    error = float(((got - expected).abs().max() / expected.abs().max()).nan_to_num(math.inf))
    # 4 standard deviations of fp32 sums of d_model and n terms, and one rounding of what is stored; torch's dense layer
    # also rounds g, u and v to the dtype, which the sums average out
    stored = UNIT_ROUNDOFF[case.dtype] if case.dtype != "float32" else 0.0
    limit = 4 * UNIT_ROUNDOFF["float32"] * (math.sqrt(2 * case.d_model) + math.sqrt(max(counts)) + 2) + 2 * stored
    if bound.layer is None:
        limit += 4 * stored
    if not error <= limit and not reason:
        reason = f"check failed: error {error:.3g} over the bound {limit:.3g} against float64"
    return Check(error, reason, 1.0 - float(np.mean(counts)) / case.d_ff, jit_s)


def layer_count(cases: Sequence[SpeedCase]) -> int:
    """Layers with distinct weights: 8, or more until every case reads over twice the L2 cache in a pass."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    least = min(needed_bytes(case, case.sparsity) for case in cases)
    return max(_MIN_LAYERS, min(_MAX_LAYERS, math.ceil(2.1 * cache / least)))


def _unsupported(case: SpeedCase) -> str:
    if case.method not in _METHODS or case.backend not in ("torch", "numba-cuda"):
        return f"method {case.method} on {case.backend}: not on a GPU"
    if not 1 <= case.batch_size <= 8:
        return f"batch size {case.batch_size}: the CUDA kernels take 1 to 8 tokens"
    if case.dtype not in DTYPES:
        return f"dtype {case.dtype}: the CUDA kernels take {', '.join(DTYPES)}"
    return ""


def driver_version() -> str:
    """CUDA version that the driver supports."""
    import cuda.bindings.driver as driver

    version = int(driver.cuDriverGetVersion()[1])
    return f"CUDA {version // 1000}.{version % 1000 // 10}"


def time_group(cases: Sequence[SpeedCase], *, seed: int = 0, progress: Progress | None = None) -> list[Row]:
    """Check and time the CUDA cases of one group; rows as `suite.speed.cases.run_group`."""

    def tell(text: str) -> None:
        if progress is not None:
            progress(text)

    rows = [skipped_row(case, reason) if (reason := _unsupported(case)) else empty_row(case) for case in cases]
    able = [index for index, row in enumerate(rows) if row["status"] != "skipped"]
    if not able:
        return rows
    with torch.inference_mode():
        rank = max((cases[i].rank or 8 for i in able), default=8)
        layers = []
        for index in range(layer_count([cases[i] for i in able])):
            tell(f"weights of layer {index}")
            layers.append(LayerData.random(cases[0], rank, seed, index))
        timed: dict[int, Timed] = {}
        firsts = [(cases[index].batch_size, bind(cases[index], layers[0]).layer) for index in able]
        tell("compile")
        compile_together([layer.plan(batch) for batch, layer in firsts if layer is not None], default_threads())
        for index in able:
            case = cases[index]
            tell(f"check {case.label}")
            torch.cuda.reset_peak_memory_stats()
            bounds = [bind(case, layer) for layer in layers]
            found = check(case, bounds[0], layers[0], seed)
            facts: Row = {"max_rel_error": found.error, "jit_s": found.jit_s, "n_layers": len(layers)}
            facts |= {"device_name": torch.cuda.get_device_name(), "driver_version": driver_version()}
            if bounds[0].layer is not None:
                facts["extra_memory_mib"] = bounds[0].layer.extra_bytes / 2**20
            facts["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
            rows[index] |= facts
            if found.reason:
                rows[index] |= {"check": "failed", "status": "failed", "reason": found.reason}
                continue
            rows[index] |= {"check": "passed"}
            timed[index] = prepare(case, bounds, layers, found.realised)
        if timed:
            bandwidth = time_interleaved(list(timed.values()), len(layers), tell)
            for index, entry in timed.items():
                rows[index] |= numbers_of(entry, bandwidth)
                if cases[index].variant == "trace":
                    entry.run()
                    torch.cuda.synchronize()
                    rows[index]["phases"] = phase_rows(entry.keep[0], clock_rate())
    return rows
