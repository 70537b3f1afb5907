"""What a factor a neuron costs: the threshold kernels without and with one, checked and timed interleaved in one process.

python -m tests.benchmarks.factor_cost [numba-cuda | numba-cpu] [SHAPE]       default: numba-cuda llama-3.1-8b
"""

from __future__ import annotations

import sys

import numpy as np

from suite.speed.bench import run_group
from suite.speed.expand import make_cases

PAIRS = {
    "m-countdown": "m-countdown-cw",
    "cats": "chess",
}


def main(backend: str = "numba-cuda", shape: str = "llama-3.1-8b") -> None:
    """Print the median of each case, and the median over the rounds of the time with a factor over that without."""
    on_gpu = backend == "numba-cuda"
    options = {"backends": [backend], "threads": [1], "dtypes": ["bfloat16" if on_gpu else "float32"]}
    options |= {"clocks": ["graph"]} if on_gpu else {}
    cases = make_cases([shape], [*PAIRS, *PAIRS.values()], [0.0, 0.5, 0.7, 0.8, 0.9], **options)
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


if __name__ == "__main__":
    main(*sys.argv[1:])
