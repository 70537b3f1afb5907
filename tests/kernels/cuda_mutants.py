"""Deliberately wrong kernels, run on the simulator; started as a process like ``cuda_cases``.

Each mutant replaces text of the kernel sources in memory; it is caught if the simulator's result leaves the bound or the
simulator raises (an access out of bounds, a thread that misses a barrier).
"""

from __future__ import annotations

import importlib
import sys

import grimp
import numpy as np

from tests.kernels import cuda_cases

_ROOM = "kernels_numba.gpu.mlp"
# name: (module, text, replacement, case, neurons kept)
MUTANTS = {
    "activation": ("sparse_rows", 'plan.activation == "gelu_tanh"', 'plan.activation == "silu"', "given", 9),
    "dropped-tail-rows": ("plan", "math.ceil(self.d_ff / self.rows)", "self.d_ff // self.rows", "m-tail", 23),
    "rows-beyond-the-tail": ("threshold", "wanted = begin + row < d_ff and", "wanted =", "m-tail", 24),
    "stale-tail-entry": ("work_list", "if tid < neurons:  # the last", "if tid < 0:  # the last", "down", 7),
    "stale-neuron": ("sparse_rows", "if number >= n * tokens:", "if number >= 32:", "m-dealt", 7),
    "off-by-one-share": ("work_list", "(1 if block < extra else 0)\n        for i", "0\n        for i", "given-blocks", 7),
    "found-twice": ("threshold", "begun += n", "begun += 1", "m", 9),
    "last-packets-dropped": ("threshold", "while kinds != 0 or following < packets", "while following < packets", "m-dealt", 9),
    "counter-not-cleared": ("work_queue", "if claims and block == 0 and", "if claims and block == 1 and", "m", 12),
    "other-counter": ("work_queue", "(read_epoch(workspace, block) & 1) * 128", "0", "m", 12),
    "claim-not-awaited": ("work_queue", "dev.shared_wait(", "(lambda slot, _: dev.shared_load_i32(slot))(", "m-bf16", 12),
    "claimed-twice": ("work_queue", "second = dev.atomic_add(counter, 1)\n", "second = first\n", "m-long", 60),
    "claims-of-one-round": ("work_queue", "k += 3", "k += 2", "m-long", 60),
    "launch-not-counted": ("grid_barrier", ">> 32) + 1) & 0x7FFFFFFF", ">> 32) + 0) & 0x7FFFFFFF", "m", 12),
    "shift-of-down-rows": ("sparse_rows", "(plan.matrices - 1) * plan.neurons * plan.slot_bytes", "0", "given", 9),
    "lost-partial-sums": ("reduce", "n_blocks - row + rows_at_once - 1", "n_blocks - row - 1", "given-blocks", 7),
    "no-residual": ("reduce", "if residual != 0:", "if residual == 1:", "down", 9),
    "all-tokens-keep": ("sparse_rows", "(entry >> (24 + token)) & 1 == 0", "token < 0", "m-batch", 6),
    "logit-of-wrong-rank": ("predictor", "if column < split or", "if column < split // 4 or", "d", 9),
    "second-part-not-received": ("predictor", "begin + rank - split)", "begin + (rank - split) // 4)", "gated", 9),
    "second-part-where-the-first-ends": ("predictor", "entry += begin - split", "entry += 0", "gated", 9),
    "parts-swapped": ("predictor", "total(parts, first_warps, row_warps)", "total(parts, 0, first_warps)", "gated", 9),
    "residual-of-a-neighbour": ("predictor", "+ first + i) * 4)", "+ first + (i ^ 1)) * 4)", "gated", 9),
    "residual-of-the-other-part": ("predictor", "(j * d_ff + first + i)", "(first + i)", "gated", 9),
    "gated-without-activation": ("predictor", 'predicted[:1] == ["act"]', "False", "gated", 12),
    "activation-of-the-gate-alone": ("predictor", 'predicted[:1] == ["act"]', "True", "gated-gate", 9),
    "square-not-root": ("predictor", "dev.sqrt(square)", "square", "gated", 9),
    "row-of-the-first-block": ("predictor", "residuals + (j * d_ff + first + i)", "residuals + (j * d_ff + i)", "gated-blocks", 15),
    "dealt-a-neighbour": ("balance", "j * 16 + place % 2 * 8", "j * 16", "d-uneven", 45),
    "dealt-to-two": ("balance", "before += under if c < block else 0", "before += 0", "d-uneven", 40),
    "dealt-to-none": ("balance", "for j in range(tid, received, threads)", "for j in range(0)", "d-blocks", 40),
    "threshold-drops-equal": ("threshold", "turn, row) < threshold)", "turn, row) <= threshold)", "m", "9="),
    "factor-ignored": ("threshold", "if scaled:\n            magnitude", "if False:\n            magnitude", "cw", 9),
    "factor-of-a-neighbour": ("threshold", "scale + (begin + i) * 4", "scale + (begin + (i ^ 1)) * 4", "cw", 9),
    "factor-of-another-packet": ("threshold", "turn - 1 if turn > 0 else depth", "turn", "cw", 9),
    "factor-read-late": ("plan", "return self.depth + 1", "return self.depth", "cw", 9),
    "factor-in-the-value": ("threshold", "if gate else total\n", "if gate else score(shared, abs(total), turn, row)\n", "cw", 12),
    "factor-beyond-the-tail": ("threshold", "and begin + tid - first < d_ff", "", "cw-tail", 20),
    "factor-before-the-activation": ("threshold", "score(shared, abs(value), turn", "score(shared, abs(total), turn", "chess", 9),
    "factor-of-token": ("threshold", "abs(value), turn, row)", "abs(value), turn, token)", "cw-batch", 6),
    "scaled-drops-equal": ("threshold", "turn, row) < threshold)", "turn, row) <= threshold)", "cw", "9="),
    "logit-drops-equal": ("predictor", "not (value < threshold)", "not (value <= threshold)", "d", "9="),
    "count-above-the-list": ("work_list", "min(max(dev.load_i32(count), 0), d_ff)", "max(dev.load_i32(count), 0)", "down", "24+9"),
    "count-below-nothing": ("work_list", "max(dev.load_i32(count), 0)", "dev.load_i32(count)", "down", "0-4000"),
    "dot-without-last-warp": ("reduce", "if i * width + part < warps:", "if i * width + part < warps - 1:", "given-wide", 8),
    "columns-without-last-warp": ("reduce", "for w in range(warps):", "for w in range(warps - 1):", "given-wide", 8),
    "logit-without-last-warp": ("predictor", "for w in range(begin, end):", "for w in range(begin, end - 1):", "d-wide", 5),
    "threshold-drops-nan": (
        "threshold", "not (score(shared, abs(value), turn, row) < threshold)",
        "(score(shared, abs(value), turn, row) >= threshold)", "nan", 5,
    ),
}  # fmt: skip


def _modules() -> list[str]:
    """The kernel and what it imports, each after those that it imports: it reaches more than they do."""
    graph = grimp.build_graph("kernels_numba", cache_dir=None)
    kernel = f"{_ROOM}.kernel"
    names = [*graph.find_upstream_modules(kernel), kernel]
    return sorted(names, key=lambda name: len(graph.find_upstream_modules(name)))


MODULES = _modules()


def caught(name: str, *, mutate: bool = True) -> bool:
    """Whether the case notices the mutant."""
    module_name, text, replacement, case, kept = MUTANTS[name]
    module = importlib.import_module(f"{_ROOM}.{module_name}")
    path = str(module.__file__)
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        source = file.read()
    if text not in source:
        raise ValueError(f"mutant {name}: its text is no longer in {module_name}.py; adapt it")
    if mutate:
        exec(compile(source.replace(text, replacement), path, "exec"), module.__dict__)
        for dependant in MODULES:  # they imported names of the module
            if dependant != module.__name__:
                importlib.reload(importlib.import_module(dependant))
        importlib.reload(cuda_cases)
    problem = cuda_cases.Problem.of(f"{'m' if case == 'nan' else case}:{kept}")
    if case == "nan":
        problem.raw["x"][0, 0] = np.nan
        return not np.isnan(problem.run()).all()
    try:
        error = problem.error()
    except (LookupError, RuntimeError):  # of memory, or of a lane that has stopped
        return True
    return not error <= cuda_cases.LIMIT[problem.plan.dtype]


if __name__ == "__main__":
    for one in sys.argv[1:]:
        sys.stdout.write(f"{one} {'missed' if not caught(one) else 'caught'}\n")
        for clean in MODULES:
            importlib.reload(importlib.import_module(clean))
        importlib.reload(cuda_cases)
