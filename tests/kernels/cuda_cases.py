"""Runs kernels on Numba's CUDA simulator and compares them with float64; started as a process of its own.

    NUMBA_ENABLE_CUDASIM=1 python -m tests.kernels.cuda_cases NAME:KEPT[:TOKENS]...  prints "CASE ok" or "CASE error ..."

KEPT may end in "=": the threshold is then the smallest kept score itself, or in +N or -N: the count that the kernel gets
is off by so much, and it has to keep within the list.

The simulator is chosen when numba is imported, hence the process. With several blocks the phases run one kernel after
another, since a simulated block cannot wait for another; a lone block runs the whole kernel.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import numpy as np
from numba import cuda

from kernels_numba.gpu.mlp.kernel import ARGUMENTS, make_kernel
from kernels_numba.gpu.mlp.plan import Plan
from kernels_numba.gpu.ptx import simulated, simulator
from kernels_numba.reference import activate, relative_error

BASE = {"d_model": 40, "d_ff": 24, "dtype": "float32", "rows": 2, "neurons": 2, "depth": 2}


def gated(*, act=0, gate=0, up=0, **changes):
    """Plan of a gated predictor with these ranks."""
    predicted = tuple((name, rank) for name, rank in (("act", act), ("gate", gate), ("up", up)) if rank)
    return Plan("predictor", **BASE | changes, rank=act + gate + up, predicted=predicted)


CASES = {
    "m": Plan("threshold", **BASE, n_blocks=1),
    "m-blocks": Plan("threshold", **BASE, n_blocks=3),
    "m-odd": Plan("threshold", **BASE, n_blocks=5),
    "m-gelu": Plan("threshold", **BASE, activation="gelu_tanh", n_blocks=1),
    "m-long": Plan("threshold", **BASE | {"d_ff": 96}, n_blocks=2),
    "m-tail": Plan("threshold", **BASE | {"rows": 16, "depth": 1}, n_blocks=1),
    "m-wide": Plan("threshold", **BASE | {"d_model": 2056}, n_blocks=1),
    "m-dealt": Plan("threshold", **BASE, n_blocks=1, deterministic=True),
    "m-dealt-blocks": Plan("threshold", **BASE, activation="gelu_tanh", n_blocks=5, deterministic=True),
    "m-bf16": Plan("threshold", **BASE | {"dtype": "bfloat16", "rows": 4, "depth": 3}, n_blocks=1),
    "m-fp16-blocks": Plan("threshold", **BASE | {"dtype": "float16"}, n_blocks=2),
    "cats": Plan("threshold", **BASE, first="gate", activation="gelu_tanh", n_blocks=1),
    "cats-blocks": Plan("threshold", **BASE, first="gate", n_blocks=2),
    "cats-dealt": Plan("threshold", **BASE, first="gate", n_blocks=1, deterministic=True),
    "cats-batch": Plan("threshold", **BASE, first="gate", batch=4, n_blocks=1),
    "cats-pair": Plan("threshold", **BASE, first="gate", batch=2, n_blocks=1),
    "m-batch": Plan("threshold", **BASE, batch=2, n_blocks=2),
    "m-batch-dealt": Plan("threshold", **BASE, batch=2, n_blocks=2, deterministic=True),
    "cw": Plan("threshold", **BASE, n_blocks=1, scaled=True),
    "cw-blocks": Plan("threshold", **BASE | {"depth": 3}, activation="gelu_tanh", n_blocks=3, scaled=True),
    "cw-long": Plan("threshold", **BASE | {"d_ff": 96}, n_blocks=2, scaled=True),
    "cw-tail": Plan("threshold", **BASE | {"rows": 16, "depth": 1}, n_blocks=1, scaled=True),
    "cw-dealt": Plan("threshold", **BASE, n_blocks=1, deterministic=True, scaled=True),
    "cw-bf16": Plan("threshold", **BASE | {"dtype": "bfloat16", "rows": 4, "depth": 3}, n_blocks=1, scaled=True),
    "cw-batch": Plan("threshold", **BASE, batch=2, n_blocks=2, scaled=True),
    "chess": Plan("threshold", **BASE, first="gate", n_blocks=1, scaled=True),
    "chess-gelu-fp16": Plan(
        "threshold", **BASE | {"dtype": "float16"}, first="gate", activation="gelu_tanh", n_blocks=2, scaled=True
    ),
    "chess-wide": Plan("threshold", **BASE | {"d_model": 136}, first="gate", n_blocks=1, scaled=True),  # two warps
    "chess-batch": Plan("threshold", **BASE, first="gate", batch=4, n_blocks=1, scaled=True),
    "d": Plan("predictor", **BASE, rank=24, n_blocks=1),
    "d-blocks": Plan("predictor", **BASE | {"d_ff": 96, "neurons": 1}, rank=24, n_blocks=3),
    "d-uneven": Plan("predictor", **BASE | {"d_ff": 80, "neurons": 1, "depth": 1}, rank=24, n_blocks=5),
    "d-pairs": Plan("predictor", **BASE | {"d_ff": 80, "depth": 1}, rank=24, batch=2, n_blocks=4),
    "d-wide": Plan(
        "predictor", **BASE | {"d_ff": 8, "rows": 16, "neurons": 4, "depth": 1}, rank=129, n_blocks=1
    ),  # two warps a row of U
    "d-gelu": Plan("predictor", **BASE | {"neurons": 1}, rank=8, activation="gelu_tanh", n_blocks=1),
    "d-batch": Plan("predictor", **BASE, rank=24, batch=2, n_blocks=1),
    "gated": gated(act=24, up=9, n_blocks=1),
    "gated-blocks": gated(act=5, up=24, d_ff=40, neurons=1, activation="gelu_tanh", batch=2, n_blocks=3),
    "gated-wide": gated(act=129, up=8, d_ff=8, rows=16, neurons=4, depth=1, n_blocks=1),  # two warps and one a row of U
    "gated-bf16": gated(act=8, up=9, dtype="bfloat16", n_blocks=1),
    "gated-batch": gated(act=24, up=9, batch=4, neurons=1, n_blocks=1),
    "gated-gate": gated(gate=24, n_blocks=1),
    "given": Plan("given", **BASE, n_blocks=1),
    "given-blocks": Plan("given", **BASE, n_blocks=5),
    "given-wide": Plan("given", **BASE | {"d_model": 136, "d_ff": 8, "depth": 1}, n_blocks=3),  # two warps in each sum
    "given-gelu-batch": Plan("given", **BASE, batch=2, activation="gelu_tanh", n_blocks=1),
    "down": Plan("down", **BASE, n_blocks=1),
    "down-blocks": Plan("down", **BASE | {"neurons": 4}, n_blocks=3),
    "down-batch": Plan("down", **BASE, batch=4, n_blocks=2),
}


def stored(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Values as the kernel stores them (bf16: its upper 16 bits) and as float64."""
    if dtype == "bfloat16":
        bits = (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    kept = np.ascontiguousarray(values, {"float16": np.float16, "float32": np.float32}[dtype])
    return kept, kept.astype(np.float64)


class Problem:
    """Random weights, inputs and buffers of a plan."""

    def __init__(self, plan: Plan, kept: int, seed: int = 0, tokens: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.plan, self.kept, self.tokens = plan, kept, plan.batch if tokens is None else tokens
        d, f = plan.d_model, plan.d_ff
        self.raw, self.exact = {}, {}
        shapes = {"gate": (f, d), "up": (f, d), "down": (f, d), "v": (max(1, plan.rank), d), "x": (plan.batch, d)}
        for name, shape in (*shapes.items(), ("residual", (plan.batch, d)), ("u", (f, max(1, plan.rank_padded)))):
            values = rng.standard_normal(shape) * (1.0 if name in ("x", "residual") else shape[1] ** -0.5)
            if name == "u" and plan.rank:
                values *= np.concatenate([np.arange(padded) < rank for rank, padded in plan.parts])
            self.raw[name], self.exact[name] = stored(values, plan.dtype)
        self.at_threshold = False
        self.scale = np.exp(rng.uniform(-4, 1, f)).astype(np.float32)  # a factor a neuron, over two decades
        self.scale[rng.permutation(f)[: f // 12]] = 0
        # mean squares that approximations miss, over two decades
        self.missed = np.exp(rng.uniform(-4, 1, (len(plan.predicted), f))).astype(np.float32)
        self.values = rng.standard_normal((plan.batch, f)).astype(np.float32)
        self.indices = rng.permutation(f).astype(np.int32)
        self.count = np.array([kept], np.int32)
        self.workspace = np.zeros(plan.workspace.total, np.uint8)
        self.y = np.full((plan.batch, d), np.nan, np.float32) if plan.dtype == "float32" else None
        if self.y is None:
            self.y = np.full((plan.batch, d), 0x7FFF, np.uint16)  # NaN in both

    @classmethod
    def of(cls, name: str) -> Problem:
        """Problem NAME:KEPT[:TOKENS]."""
        case, kept, *rest = name.split(":")
        found = re.fullmatch(r"(\d+)(=|[+-]\d+)?", kept)
        assert found is not None, name
        problem = cls(CASES[case], int(found[1]), tokens=int(rest[0]) if rest else None)
        if found[2] == "=":
            problem.make_scores_whole()
        elif found[2]:
            problem.count += int(found[2])
        return problem

    def make_scores_whole(self) -> None:
        """Scores 1 to d_ff (times a power of 2), exact in every dtype, with a threshold that one of them is equal to."""
        self.at_threshold = True
        self.missed[:] = 0
        self.scale = np.float32(2.0) ** np.random.default_rng(2).integers(-3, 3, self.plan.d_ff).astype(np.float32)
        ranks = np.random.default_rng(1).permutation(self.plan.d_ff) + 1.0
        if self.plan.kind == "predictor":
            columns = {"x": 1.0, "v": np.arange(self.plan.rank) == 0, "u": ranks}
        else:
            columns = {"x": 1.0, self.plan.first: ranks}
        for name, column in columns.items():
            values = self.exact[name].copy()
            values[:, 0] = column
            if name in ("x", "u") or self.plan.kind != "predictor":
                values[:, 1:] = 0
            self.raw[name], self.exact[name] = stored(values, self.plan.dtype)

    def scores(self) -> np.ndarray:
        """(batch, d_ff), float64."""
        e = self.exact
        if self.plan.predicted:
            return np.sqrt(np.prod(self.expected_squares(), axis=0))
        if self.plan.kind == "predictor":
            return (e["x"] @ e["v"].T) @ e["u"][:, : self.plan.rank].T
        gate = self.plan.first == "gate"
        dots = e["x"] @ e["gate" if gate else "up"].T
        magnitudes = np.abs(activate(dots, self.plan.activation) if gate else dots)
        return magnitudes * self.scale if self.plan.scaled else magnitudes

    def expected_squares(self) -> list[np.ndarray]:
        """Of each quantity of a gated predictor, (batch, d_ff), float64."""
        found, first, column = [], 0, 0
        for (name, rank), (_, padded), missed in zip(
            self.plan.predicted, self.plan.parts, self.missed.astype(np.float64), strict=True
        ):
            z = self.exact["x"] @ self.exact["v"][first : first + rank].T
            guess = z @ self.exact["u"][:, column : column + rank].T
            found.append(np.square(activate(guess, self.plan.activation) if name == "act" else guess) + missed)
            first, column = first + rank, column + padded
        return found

    @property
    def threshold(self) -> float:
        """Keeps ``kept`` neurons of the first token."""
        ranked = np.sort(self.scores()[0])[::-1]
        if self.at_threshold:
            return float(ranked[self.kept - 1])
        if self.kept == len(ranked):
            return -np.inf
        return float(ranked[0] + 1 if self.kept == 0 else (ranked[self.kept - 1] + ranked[self.kept]) / 2)

    def expected(self) -> np.ndarray:
        """(tokens, d_model), float64."""
        e, n = self.exact, self.tokens
        act, up = activate(e["x"] @ e["gate"].T, self.plan.activation), e["x"] @ e["up"].T
        if self.plan.kind == "down":
            v = np.zeros_like(up)
            v[:, self.indices[: self.kept]] = self.values[:, : self.kept]
        elif self.plan.kind == "given":
            v = np.zeros_like(up)
            used = self.indices[: self.kept]
            v[:, used] = (act * up)[:, used]
        else:
            v = act * up * ~(self.scores() < self.threshold)
        return (v @ e["down"] + e["residual"])[:n]

    def run(self, module: object = simulated) -> np.ndarray:
        """Output of the kernel on the simulator, float64; ``module`` may be a deliberately wrong twin."""
        plan, raw = self.plan, self.raw
        dense, a = (raw["gate"], raw["up"]) if plan.first == "gate" else (raw["up"], raw["gate"])
        buffers = {"x": raw["x"], "down": raw["down"], "residual": raw["residual"], "y": self.y}
        buffers |= {"workspace": self.workspace, "a": a, "dense": dense}
        if plan.kind == "predictor":
            buffers |= {"dense": raw["v"], "u": raw["u"], "a": raw["gate"], "b": raw["up"]}
        if plan.kind in ("given", "down"):
            buffers |= {"a": raw["gate"], "b": raw["up"], "indices": self.indices, "count": self.count}
            buffers |= {"values": self.values}
        if plan.scaled or plan.predicted:
            buffers |= {"values": self.scale if plan.scaled else self.missed}
        arguments = [buffers[n].ctypes.data if n in buffers else 0 for n in ARGUMENTS[:12]]
        arguments += [
            plan.d_ff,
            np.float32(self.threshold) if plan.kind in ("threshold", "predictor") else 0,
            self.tokens,
        ]
        first = ["project", "select"] if plan.kind == "predictor" else []
        plans = [plan] if plan.n_blocks == 1 else [replace(plan, phases=(p,)) for p in (*first, "sparse", "reduce")]
        with simulator.allowed(*buffers.values(), shared_bytes=plan.shared.total):
            for part in plans:
                kernel = cuda.jit(make_kernel(part, module))
                kernel[part.n_blocks, part.launch_threads, 0, 0](*arguments)
        if len(plans) > 1:  # the one launch they stand for would end with every block's flag, and so begin a new epoch
            at = plan.workspace.done
            self.workspace[at : at + plan.n_blocks * 8].view(np.int64)[:] += 1 << 32
        if plan.dtype == "bfloat16":
            return ((self.y.astype(np.uint32) << 16).view(np.float32).astype(np.float64))[: self.tokens]
        return self.y.view(np.float16 if plan.dtype == "float16" else np.float32).astype(np.float64)[: self.tokens]

    def error(self, module: object = simulated) -> float:
        """Relative error of the simulated kernel: the worst of several launches, which find what those before left behind.

        Claims are counted in one of two counters, so the third launch is the first to count where another has.
        """
        worst = 0.0
        for _ in range(3 if self.plan.claims else 2):
            self.y.fill(np.nan if self.plan.dtype == "float32" else 0x7FFF)
            error = relative_error(self.run(module).ravel(), self.expected().ravel())
            worst = error if not error <= worst else worst
            if not worst <= LIMIT[self.plan.dtype]:
                break
        return worst


LIMIT = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}  # 4 u sqrt(n) of the sums, 2 u of a narrow output


def main(names: list[str]) -> None:
    """Run cases NAME:KEPT[:TOKENS]."""
    for name in names:
        problem = Problem.of(name)
        error = problem.error()
        sys.stdout.write(f"{name} {'ok' if error <= LIMIT[problem.plan.dtype] else f'error {error:.3g}'}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
