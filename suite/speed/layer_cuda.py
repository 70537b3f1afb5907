"""Layers on a GPU: checked against float64, then timed as graphs or launches over layers with distinct weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kernels_numba.gpu.host import layers as kernels
from kernels_numba.gpu.host.down_proj import DownProjection
from kernels_numba.gpu.host.jit import compile_together
from kernels_numba.reference import UNIT_ROUNDOFF, wrongly_selected
from suite.decoding.graphs import captured
from suite.devices import torch_dtype
from suite.modeling.decode import KERNEL_DTYPES
from suite.speed.case import Check, Kernel, Row, SpeedCase, needed_bytes
from suite.speed.clock import ReadBandwidth, Rounds, clock_rate, cuda_bandwidth, event_times
from suite.speed.expand import default_threads
from suite.speed.layer import Draw, LayerData, LayerRig, dense_layer, phase_rows, why_no_kernel
from suite.speed.rig import Subject

_MIN_LAYERS, _MAX_LAYERS = 8, 24
_MOST_TOKENS = 8
_VARIANTS: dict[str, dict[str, bool]] = {  # of the plan
    "no-overlap": {"overlap": False}, "deterministic": {"deterministic": True}, "trace": {"trace": True},
}  # fmt: skip


def random_draw(case: SpeedCase, seed: int, index: int) -> Draw:
    """Draws the matrices of layer ``index`` one after another from one generator."""
    generator = torch.Generator(device="cuda").manual_seed(seed * 1009 + index)

    def draw(name: str, shape: tuple[int, ...], scale: float) -> Tensor:
        values = torch.randn(*shape, device="cuda", generator=generator) * scale
        return values.to(torch_dtype(case.dtype))

    return draw


@cache
def compiled_dense() -> Callable[..., Tensor]:
    """Torch's dense layer through torch.compile, tuned; without its own graphs, as the case is captured in one with all layers."""
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
    copies: int = 0  # bytes of copied weights beside those of a kernel's layer

    def active(self, token: int) -> Tensor | None:
        """Active neurons of a token in the last call; None if dense."""
        return self.listed if self.listed is not None else self.layer.active(token) if self.layer is not None else None


def bind(case: SpeedCase, data: LayerData) -> Bound:
    """Bind a case to a layer's weights; the sparsity is set for the layer's own input."""
    kinds = {Kernel.DENSE: _bind_dense, Kernel.GIVEN: _bind_given, Kernel.GATHERED: _bind_gathered}
    bound = kinds.get(case.kernel, _bind_choosing)(case, data)
    if bound.layer is not None and case.variant in _VARIANTS:
        bound.layer.change_plan(**_VARIANTS[case.variant])
    return bound


def _bind_dense(case: SpeedCase, data: LayerData) -> Bound:
    if case.level == "op":
        values = torch.mul(*data.own).to(data.x.dtype)
        return Bound(lambda x, out: out.copy_(functional.linear(values, data.w_down)), values=values)
    if case.variant == "compile":
        arguments = (data.w_gate, data.w_up, data.w_down, data.activation)
        return Bound(lambda x, out: compiled_dense()(x, *arguments))
    return Bound(lambda x, out: data.dense(x))


def _bind_given(case: SpeedCase, data: LayerData) -> Bound:
    listed = data.given(case)
    count = torch.tensor([len(listed)], dtype=torch.int32, device="cuda")
    if case.level == "op":
        values = torch.mul(*data.own)[:, listed.long()].to(data.x.dtype).contiguous()
        op = DownProjection(data.w_down_t)
        return Bound(
            lambda x, out: op(values, listed, count, out), op, listed, values,
            again=lambda x, out: op.bind(values, listed, count, out),
        )  # fmt: skip
    given = kernels.GivenLayer(data.w_gate, data.w_up, data.w_down_t, activation=case.activation)
    return Bound(
        lambda x, out: given(x, listed, count, out), given, listed,
        again=lambda x, out: given.bind(x, listed, count, out),
    )  # fmt: skip


def _bind_gathered(case: SpeedCase, data: LayerData) -> Bound:
    """A dense layer of k neurons."""
    listed, weights = data.gathered(case)
    copies = sum(weight.nbytes for weight in weights)
    return Bound(lambda x, out: data.apply_gathered(x, weights), listed=listed, copies=copies)


def _bind_choosing(case: SpeedCase, data: LayerData) -> Bound:
    """A kernel that finds its active set itself: by a predictor or by the first projection."""
    weights, threshold = (data.w_gate, data.w_up, data.w_down_t), data.threshold(case)
    options: dict[str, Any] = {"activation": case.activation, "threshold": threshold}
    if case.kernel is Kernel.PREDICTOR:
        layer: Any = kernels.PredictorLayer(*weights, *data.predictor(case), **options)
    else:
        options |= data.of_score(case)
        layer = kernels.ThresholdLayer(*weights, **options)
    return Bound(lambda x, out: layer(x, out), layer, threshold=threshold, again=lambda x, out: layer.bind(x, out))


def _expected(case: SpeedCase, bound: Bound, data: LayerData, x: Tensor) -> tuple[Tensor, list[int], str]:
    """Float64 output on the kernel's own active set, active neurons of each token, and what is wrong with the set."""
    down = data.w_down.double()
    if case.level == "op" and bound.values is not None:
        columns = down if bound.listed is None else down[:, bound.listed.long()]
        return bound.values.double() @ columns.T, [columns.shape[1]] * len(x), ""
    act, up = data.projections(x)
    product, counts, wrong = act * up, [], ""
    magnitudes = None if bound.threshold is None else data.magnitudes(case, x).cpu().numpy()
    scale, rank = data.scale(case, x), case.rank or 0
    factors = None if scale is None else scale.expand(len(x), -1).cpu().numpy()
    for token in range(len(x)):
        active = bound.active(token)
        if active is None:
            counts.append(case.d_ff)
            continue
        counts.append(len(active))
        mask = torch.zeros(case.d_ff, dtype=torch.bool, device="cuda")
        mask[active.long()] = True
        product[token] *= mask
        if magnitudes is not None and bound.threshold is not None:
            # a projection of length d_model, or rank on top of it, rounds differently in fp32: scores close by may differ
            found = active.cpu().numpy()
            one = None if factors is None else factors[token]
            bad = wrongly_selected(
                magnitudes[token], found, bound.threshold, case.d_model, one, rank if factors is not None else 0
            )
            if len(bad):
                wrong = f"check failed: {len(bad)} neurons wrongly kept or dropped, first {bad[0]}"
    return product @ down.T, counts, wrong


class CudaSubject(Subject):
    """A case on every layer of a rig."""

    rounds = Rounds(least=50, most=50)

    def __init__(self, case: SpeedCase, layers: Sequence[LayerData], seed: int) -> None:
        super().__init__(case)
        torch.cuda.reset_peak_memory_stats()
        self._layers, self._seed = layers, seed
        self.bounds = [bind(case, layer) for layer in layers]
        self.realised, self.launch_us = 0.0, 0.0
        self._capture_s: float | None = None
        self._run: Callable[[], None] = self._launch
        self._calls: list[Callable[[], object]] = []
        self._outs = [torch.empty_like(layer.x) for layer in layers]

    def check(self) -> Check:
        """One call on a fresh input with the output poisoned with NaN, compared with float64 on the kernel's own set."""
        case, bound, data = self.case, self.bounds[0], self._layers[0]
        generator = torch.Generator(device="cuda").manual_seed(self._seed + 77)
        x = torch.randn(data.x.shape, device="cuda", generator=generator).to(data.x.dtype)
        out = torch.full_like(x, math.nan)
        start = time.perf_counter()
        bound.call(data.x, out)
        torch.cuda.synchronize()
        jit_s = time.perf_counter() - start if case.variant == "compile" else None
        if bound.layer is not None:
            jit_s = bound.layer.prepare(case.batch_size).jit_s
        _, counts, _ = _expected(case, bound, data, data.x)
        self.realised = 1.0 - float(np.mean(counts)) / case.d_ff
        out.fill_(math.nan)
        result = bound.call(x, out)
        got = (result if isinstance(result, Tensor) else out).double()
        expected, _, reason = _expected(case, bound, data, x)
        error = float(((got - expected).abs().max() / expected.abs().max()).nan_to_num(math.inf))
        limit = self._limit(max(counts))
        if not error <= limit and not reason:
            reason = f"check failed: error {error:.3g} over the bound {limit:.3g} against float64"
        facts: Row = {"jit_s": jit_s, "n_layers": len(self._layers)}
        if bound.layer is not None:
            facts["extra_memory_mib"] = bound.layer.extra_bytes / 2**20
        elif bound.copies:
            facts["extra_memory_mib"] = bound.copies / 2**20
        return Check(error, reason, facts | {"peak_memory_mib": torch.cuda.max_memory_allocated() / 2**20})

    def _limit(self, most_active: int) -> float:
        """Four standard deviations of fp32 sums of d_model and n terms, and one rounding of what is stored.

        Torch's dense layer also rounds g, u and v to the dtype, which the sums average out.
        """
        stored = UNIT_ROUNDOFF[self.case.dtype] if self.case.dtype != "float32" else 0.0
        sums = math.sqrt(2 * self.case.d_model) + math.sqrt(most_active) + 2
        limit = 4 * UNIT_ROUNDOFF["float32"] * sums + 2 * stored
        return limit + 4 * stored if self.bounds[0].layer is None else limit

    def prepare(self) -> None:
        """Warm up on a stream of its own, measure the host time of the launches, and capture them unless timed by events."""
        self._calls = [
            bound.again(layer.x, out) if bound.again else partial(bound.call, layer.x, out)
            for bound, layer, out in zip(self.bounds, self._layers, self._outs, strict=True)
        ]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._launch()
            torch.cuda.synchronize()
            host = []
            for _ in range(5):
                start = time.perf_counter()
                self._launch()
                host.append((time.perf_counter() - start) / len(self._layers) * 1e6)
                torch.cuda.synchronize()
        self.launch_us = float(np.median(host))
        if self.case.clock == "graph":
            start = time.perf_counter()
            self._run = captured(self._launch, warm_up=0).replay
            self._capture_s = time.perf_counter() - start

    def _launch(self) -> None:
        for call in self._calls:
            call()

    def run(self) -> None:
        """Pass over all layers."""
        self._run()

    def sample(self, bandwidth: ReadBandwidth | None) -> list[float]:
        """One pass, after another: the sample before belongs to another case, whose weights are what L2 holds."""
        self._run()
        return [seconds / len(self._layers) for seconds in event_times(self._run, 1)]

    @property
    def needed_bytes(self) -> float:
        """Of the weights of a layer."""
        return needed_bytes(self.case, self.realised)

    def facts(self, seconds: float) -> Row:
        """Realised sparsity, times of launch and capture, and phases of a trace."""
        found: Row = {"sparsity_realized": self.realised, "launch_us": self.launch_us, "capture_s": self._capture_s}
        if self.case.variant == "trace":
            self._run()
            torch.cuda.synchronize()
            found["phases"] = phase_rows([bound.layer.phases() for bound in self.bounds], clock_rate())
        return found


class CudaRig(LayerRig):
    """Layers with distinct weights, over twice the L2 cache."""

    @staticmethod
    def why_not(case: SpeedCase) -> str:
        """As `Rig`."""
        if not 1 <= case.batch_size <= _MOST_TOKENS:
            return f"batch size {case.batch_size}: the CUDA kernels take 1 to {_MOST_TOKENS} tokens"
        if case.dtype not in KERNEL_DTYPES["cuda"]:
            return f"dtype {case.dtype}: the CUDA kernels take {', '.join(KERNEL_DTYPES['cuda'])}"
        if case.predictor:
            return "no kernel computes a gated predictor within a layer: time it at level decode"
        return why_no_kernel(case)

    def batches(self) -> Iterator[Sequence[SpeedCase]]:
        """As `Rig`; makes the weights and compiles the kernels side by side."""
        draw_of = partial(random_draw, self.cases[0], self.seed)
        self._make_layers(layer_count(self.cases), draw_of, kernels.transpose_down, torch.float64)
        firsts = [(case.batch_size, bind(case, self.layers[0]).layer) for case in self.cases]
        self.tell("compile")
        compile_together([layer.plan(batch) for batch, layer in firsts if layer is not None], default_threads())
        yield self.cases

    def subject(self, case: SpeedCase) -> CudaSubject:
        """As `Rig`."""
        return CudaSubject(case, self.layers, self.seed)

    def bandwidth(self) -> ReadBandwidth:
        """As `Rig`."""
        return cuda_bandwidth()


def layer_count(cases: Sequence[SpeedCase]) -> int:
    """Layers with distinct weights: 8, or more until every case reads over twice the L2 cache in a pass."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    least = min(needed_bytes(case, case.sparsity) for case in cases)
    return max(_MIN_LAYERS, min(_MAX_LAYERS, math.ceil(2.1 * cache / least)))
