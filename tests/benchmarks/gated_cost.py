"""What a gated predictor costs over a low-rank one of the same bytes: 256 + 256 against 512, timed interleaved in one process.

python -m tests.benchmarks.gated_cost [SHAPE...]       default: the four large shapes; an NVIDIA GPU

Both kinds read the same V and U, halved for the gated one, and are checked against float64 before they are timed.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from kernels_numba.gpu.host.gated import GatedPredictorLayer
from kernels_numba.gpu.host.layers import PredictorLayer, transpose_down
from kernels_numba.reference import UNIT_ROUNDOFF, Gated, LowRank, wrongly_selected
from suite.decoding.graphs import captured
from suite.decoding.parts import activate
from suite.decoding.shapes import SHAPES
from suite.speed.clock import Rounds, event_times, time_interleaved

RANK, LAYERS, SPARSITIES = 512, 8, (0.5, 0.7, 0.8, 0.9)  # 8 layers read over twice the L2 cache at every sparsity


class Pair:
    """A layer of each kind on the same weights."""

    def __init__(self, d_model: int, d_ff: int, activation: str, seed: int) -> None:
        generator = torch.Generator(device="cuda").manual_seed(seed)

        def normal(rows: int, columns: int) -> torch.Tensor:
            return (torch.randn(rows, columns, device="cuda", generator=generator) * columns**-0.5).bfloat16()

        self.x = normal(1, d_model) * d_model**0.5
        self.gate, self.up, self.down = normal(d_ff, d_model), normal(d_ff, d_model), normal(d_model, d_ff)
        self.activation, self.v, self.u = activation, normal(RANK, d_model), normal(d_ff, RANK)
        missed = torch.rand(2, d_ff, device="cuda", generator=generator)
        halves = zip(self.v.chunk(2), self.u.chunk(2, 1), missed, strict=True)
        self.gated = Gated(*(LowRank(v.T, u.contiguous(), residual) for v, u, residual in halves))
        weights = (self.gate, self.up, transpose_down(self.down))
        options = {"activation": activation, "threshold": 0.0}
        self.layers = {
            "low-rank": PredictorLayer(*weights, self.v, self.u, **options),
            "gated": GatedPredictorLayer(*weights, self.gated, **options),
        }
        self.outs = {kind: torch.empty_like(self.x) for kind in self.layers}
        self.logits = {
            "low-rank": (self.x.double() @ self.v.double().T @ self.u.double().T)[0],
            "gated": self.gated.logits(self.x.double(), activation)[0],
        }

    def set_sparsity(self, sparsity: float) -> None:
        """Thresholds that keep the same number of neurons."""
        for kind, layer in self.layers.items():
            ranked = self.logits[kind].sort(descending=True).values
            kept = round(len(ranked) * (1 - sparsity))
            layer.threshold = float((ranked[kept - 1] + ranked[kept]) / 2)

    def check(self, kind: str) -> str:
        """What is wrong with a layer; empty if nothing is."""
        layer, out = self.layers[kind], self.outs[kind].fill_(torch.nan)
        layer(self.x, out)
        active = layer.active()
        logits = self.logits[kind].cpu().numpy()
        bad = wrongly_selected(logits, active.cpu().numpy(), layer.threshold, self.x.shape[1])
        x = self.x.double()
        v = activate(x @ self.gate[active].double().T, self.activation) * (x @ self.up[active].double().T)
        right = v @ self.down[:, active].double().T
        error = float((out.double() - right).abs().max() / right.abs().max())
        right = not len(bad) and error < 2 * UNIT_ROUNDOFF["bfloat16"]
        return "" if right else f"{len(bad)} wrongly kept or dropped, error {error:.3g}"


def time_shape(name: str) -> None:
    """Print a line a sparsity."""
    shape = SHAPES[name]
    pairs = [Pair(shape.d_model, shape.d_ff, shape.activation, seed) for seed in range(LAYERS)]
    for sparsity in SPARSITIES:
        runs = {}
        for pair in pairs:
            pair.set_sparsity(sparsity)
        for kind in pairs[0].layers:
            if wrong := pairs[0].check(kind):
                sys.stdout.write(f"{name} {sparsity:g} {kind}: {wrong}\n")
                return
            calls = [pair.layers[kind].bind(pair.x, pair.outs[kind]) for pair in pairs]
            runs[kind] = captured(lambda calls=calls: [call() for call in calls]).replay

        def sample(run):  # the first pass leaves in L2 what every sample finds there
            run()
            return event_times(run, 1)

        samples = [lambda run=run: sample(run) for run in runs.values()]
        times = time_interleaved(samples, Rounds(least=100, most=100), lambda: None, lambda _: None)
        plain, gated = (np.array(one) * 1e6 / LAYERS for one in times)
        sys.stdout.write(
            f"{name} {sparsity:g}: low-rank {np.median(plain):.2f} us, gated {np.median(gated):.2f} us, "
            f"difference {np.median(gated - plain):+.2f} us\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    with torch.inference_mode():
        for one in sys.argv[1:] or [name for name in SHAPES if name != "embedded"]:
            time_shape(one)
