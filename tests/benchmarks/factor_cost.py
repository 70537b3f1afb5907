"""What a factor a neuron costs: the threshold kernels without and with one, checked and timed interleaved in one process.

python -m tests.benchmarks.factor_cost [numba-cuda | numba-cpu] [SHAPE]       default: numba-cuda llama-3.1-8b
python -m tests.benchmarks.factor_cost low-rank [SHAPE...]       factors made by a low rank on a GPU; default: four shapes
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from suite.decoding.shapes import shape_of
from suite.speed.bench import run_group
from suite.speed.expand import make_cases

PAIRS = {
    "m-countdown": "m-countdown-cw",
    "cats": "chess",
}
SPARSITIES = [0.0, 0.5, 0.7, 0.8, 0.9]
SHAPES = ("llama-3.1-8b", "gemma-2-9b", "qwen2.5-14b", "phi-4")
RANKS = (64, 128)
N_LAYERS, ROUNDS = 8, 30


def main(backend: str = "numba-cuda", shape: str = "llama-3.1-8b") -> None:
    """Print the median of each case, and the median over the rounds of the time with a factor over that without."""
    on_gpu = backend == "numba-cuda"
    options = {"backends": [backend], "threads": [1], "dtypes": ["bfloat16" if on_gpu else "float32"]}
    options |= {"clocks": ["graph"]} if on_gpu else {}
    cases = make_cases([shape], [*PAIRS, *PAIRS.values()], SPARSITIES, **options)
    rows = {(case.method, case.sparsity): row for case, row in zip(cases, run_group(cases), strict=True)}
    for (name, sparsity), row in rows.items():
        if name not in PAIRS:
            continue
        other = rows[PAIRS[name], sparsity]
        if row["check"] != "passed" or other["check"] != "passed":
            sys.stdout.write(f"{name} {sparsity:g}: {row['reason'] or other['reason']}\n")
            continue
        plain, scaled = (np.array(one["timings"]) for one in (row, other))
        n = min(len(plain), len(scaled))
        sys.stdout.write(
            f"{name} {sparsity:g}: {np.median(plain):.2f} us, with a factor {np.median(scaled):.2f} us, "
            f"ratio {np.median(scaled[:n] / plain[:n]):.4f}\n"
        )


class LowRankLayers:
    """Layers of a shape with random weights, bf16, and their kernels with factors of every kind."""

    def __init__(self, shape: str, first: str, changes: dict[str, Any]) -> None:
        import torch

        from kernels_numba.gpu.host.layers import ThresholdLayer
        from kernels_numba.reference import LowRank

        self.sizes, self.first, generator = shape_of(shape), first, torch.Generator(device="cuda").manual_seed(0)
        d_model, d_ff = self.sizes.d_model, self.sizes.d_ff

        def normal(n_rows: int, n_columns: int, by: float) -> Any:
            drawn = torch.randn(n_rows, n_columns, device="cuda", generator=generator) * by
            return drawn.to(torch.bfloat16)

        self.layers: dict[str, list[Any]] = {name: [] for name in ("none", "factor", *map(str, RANKS))}
        self.weights, self.given, self.x = [], [], normal(1, d_model, 1.0)
        for _ in range(N_LAYERS):
            self.weights.append([normal(d_ff, d_model, d_model**-0.5) for _ in range(3)])
            scale = torch.rand(d_ff, device="cuda", generator=generator) + 0.1
            low = {
                r: LowRank(normal(d_model, r, d_model**-0.5), normal(d_ff, r, r**-0.5), scale.square()) for r in RANKS
            }
            self.given.append({"none": {}, "factor": {"scale": scale}} | {str(r): {"low_rank": low[r]} for r in RANKS})
            options = {"activation": self.sizes.activation, "first": first, "threshold": 0.0}
            for name, given in self.given[-1].items():
                self.layers[name].append(ThresholdLayer(*self.weights[-1], **options, **given))
                if name in map(str, RANKS):
                    self.layers[name][-1].change_plan(**changes)
        self.outs = [torch.empty_like(self.x) for _ in range(N_LAYERS)]

    def act(self, gate: Any) -> Any:
        """The shape's activation function."""
        from torch.nn.functional import gelu, silu

        return silu(gate) if self.sizes.activation == "silu" else gelu(gate, approximate="tanh")

    def scores(self, name: str, i: int) -> tuple[Any, Any]:
        """Scores and v of layer i, fp64."""
        x, (gate, up, _) = self.x[0].double(), self.weights[i]
        act, up = self.act(gate.double() @ x), up.double() @ x
        given, scores = self.given[i][name], (up if self.first == "up" else act).abs()
        if "scale" in given:
            scores = scores * given["scale"].double()
        if "low_rank" in given:
            low = given["low_rank"]
            guess = low.u.double() @ (x @ low.v.double())
            guess = self.act(guess) if self.first == "up" else guess
            scores = scores * (guess.square() + low.residual.double()).sqrt()
        return scores, act * up

    def set_and_check(self, name: str, sparsity: float) -> str:
        """Set all thresholds; empty if every layer then keeps the right neurons and adds them up right."""
        import torch

        for i, layer in enumerate(self.layers[name]):
            scores, v = self.scores(name, i)
            layer.threshold = float(scores.quantile(sparsity)) if sparsity else -float("inf")
            y, active = layer(self.x, self.outs[i])[0].double(), layer.active()
            kept = torch.zeros(len(scores), dtype=torch.bool, device="cuda")
            kept[active] = True
            wrong = kept == (scores < layer.threshold)
            if wrong.any() and float((scores[wrong] - layer.threshold).abs().max()) > 1e-4 * float(scores.max()):
                return f"layer {i}: {int(wrong.sum())} neurons on the wrong side of the threshold"
            expected = (v * kept) @ self.weights[i][2].double()
            if not float((y - expected).abs().max()) < 0.01 * float(expected.abs().max()):
                return f"layer {i}: y is wrong"
        return ""

    def time(self, sparsity: float) -> dict[str, Any]:
        """Microseconds a layer of every round, the kinds by turns."""
        import torch

        graphs, times = {}, {name: [] for name in self.layers}
        for name, layers in self.layers.items():
            if reason := self.set_and_check(name, sparsity):
                sys.stdout.write(f"{name} at {sparsity:g}: {reason}\n")
            graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[name]):
                for layer, out in zip(layers, self.outs, strict=True):
                    layer(self.x, out)
        for name in list(graphs) * ROUNDS:
            graphs[name].replay()  # one untimed, then ten timed
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(10):
                graphs[name].replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3 / 10 / N_LAYERS)
        return {name: np.array(values) for name, values in times.items()}


def low_rank(*arguments: str) -> None:
    """Print medians of a shape's kernels without, with a factor and with low ranks; NAME=VALUE changes their plan."""
    import torch

    changes = {k: int(v) for k, v in (one.split("=") for one in arguments if "=" in one)}
    sys.stdout.write(f"{torch.cuda.get_device_name()}, plan {changes or 'as tuned'}, us a layer: median (over none)\n")
    for shape in [one for one in arguments if "=" not in one] or SHAPES:
        for first in ("up", "gate"):
            subject = LowRankLayers(shape, first, changes)
            for sparsity in SPARSITIES:
                times = subject.time(sparsity)
                each = [f"{k} {np.median(t):.2f} ({np.median(t - times['none']):+.2f})" for k, t in times.items()]
                sys.stdout.write(f"{shape} {first} {sparsity:g}: {', '.join(each)}\n")
            del subject
            torch.cuda.empty_cache()


if __name__ == "__main__":
    if sys.argv[1:2] == ["low-rank"]:
        low_rank(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
