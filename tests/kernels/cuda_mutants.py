"""Deliberately wrong kernels, run on the simulator; started as a process like ``cuda_cases``.

Each mutant replaces text of the kernel sources in memory; it is caught if the simulator's result leaves the bound or the
simulator raises (an access out of bounds, a thread that misses a barrier).
"""

from __future__ import annotations

import importlib
import sys

import numpy as np

from tests.kernels import cuda_cases

# name: (module, text, replacement, case, neurons kept)
MUTANTS = {
    "activation": ("stream", 'plan.activation == "gelu_tanh"', 'plan.activation == "silu"', "given", 9),
    "dropped-tail-rows": ("choose", "steps = (end + rows - 1) // rows", "steps = end // rows", "m-odd", 24),
    "stale-tail-entry": ("combine", "if tid < neurons:  # the last", "if tid < 0:  # the last", "m", 7),
    "off-by-one-share": ("combine", "(1 if block < extra else 0)\n        for i", "0\n        for i", "given-blocks", 7),
    "held-twice": ("combine", "load_i(shared + found_at + (held + i) * 4)", "load_i(shared + found_at + i * 4)", "m", 9),
    "shift-of-down-rows": ("combine", "(plan.matrices - 1) * plan.neurons * plan.slot_bytes", "0", "given", 9),
    "lost-partial-sums": ("combine", "n_blocks - row + rows_at_once - 1", "n_blocks - row - 1", "given-blocks", 7),
    "no-residual": ("combine", "if residual != 0:", "if residual == 1:", "down", 9),
    "all-tokens-keep": ("combine", "(entry >> (24 + token)) & 1 == 0", "token < 0", "m-batch", 6),
    "logit-of-wrong-rank": ("choose", "if i % padded < rank:", "if i % padded < rank // 4:", "d", 9),
    "threshold-drops-nan": ("choose", "not (abs(value) < threshold)", "abs(value) >= threshold", "nan", 5),
}  # fmt: skip


def caught(name: str, *, mutate: bool = True) -> bool:
    """Whether the case notices the mutant."""
    module_name, text, replacement, case, kept = MUTANTS[name]
    module = importlib.import_module(f"kernels_numba.gpu.{module_name}")
    path = str(module.__file__)
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        source = file.read()
    if text not in source:
        raise ValueError(f"mutant {name}: its text is no longer in {module_name}.py; adapt it")
    if mutate:
        exec(compile(source.replace(text, replacement), path, "exec"), module.__dict__)
        for dependant in ("choose", "combine", "kernel"):  # they imported names of the module
            if dependant != module_name:
                importlib.reload(importlib.import_module(f"kernels_numba.gpu.{dependant}"))
        importlib.reload(cuda_cases)
    problem = cuda_cases.Problem(cuda_cases.CASES["m" if case == "nan" else case], kept)
    if case == "nan":
        problem.raw["x"][0, 0] = np.nan
        return not np.isnan(problem.run()).all()
    try:
        error = problem.error()
    except (IndexError, RuntimeError):
        return True
    return not error <= cuda_cases.LIMIT[problem.plan.dtype]


if __name__ == "__main__":
    for one in sys.argv[1:]:
        sys.stdout.write(f"{one} {'missed' if not caught(one) else 'caught'}\n")
        for clean in ("stream", "choose", "combine", "kernel"):
            importlib.reload(importlib.import_module(f"kernels_numba.gpu.{clean}"))
        importlib.reload(cuda_cases)
