"""Every CUDA kernel on Numba's simulator against float64: kinds, dtypes, activations, batches, edge counts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("numba.cuda", reason="needs numba-cuda or numba's own CUDA target")

# case:kept[:tokens] of cuda_cases; kept 0, 1 and all 24 are the edges
GROUPS = {
    "claimed": ["m:5", "m:0", "m:24", "m-gelu:1", "m-blocks:7", "m-tail:23", "m-wide:9"],
    "equal to the threshold": ["m:9=", "d:9="],
    "count beyond the list": ["down:24+9", "down:0-4000", "given:24+1"],
    "several warps": ["d-wide:5", "given-wide:8"],
    "cats": ["cats:1", "cats:24", "cats-blocks:24", "cats-pair:5:1", "cats-dealt:0", "cats-dealt:7"],
    "deterministic": ["m-dealt:0", "m-dealt:1", "m-dealt:24", "m-dealt-blocks:7", "m-batch-dealt:6"],
    "factor": ["cw:5", "cw:0", "cw:1", "cw:24", "cw:9=", "cw-blocks:7", "cw-tail:20", "cw-long:50"],
    "factor, deterministic and narrow": ["cw-dealt:7", "cw-dealt:24", "cw-bf16:6", "cw-batch:6"],
    "factor of the gate": ["chess:7", "chess:24", "chess-wide:9", "chess-gelu-fp16:5", "chess-batch:4:3"],
    "narrow": ["m-bf16:6", "m-fp16-blocks:5", "m-long:50"],
    "batch": ["cats-batch:4:3", "m-batch:6", "d-batch:4:1"],
    "predictor": ["d:5", "d:0", "d:24", "d-gelu:1"],
    "dealt": ["d-blocks:40", "d-blocks:0"],
    "dealt unevenly": ["d-blocks:96", "d-uneven:40", "d-pairs:30:1"],
    "gated": ["gated:5", "gated:0", "gated-gate:9=", "gated-wide:5", "gated-batch:5:3"],
    "gated, several blocks and narrow": ["gated-blocks:15", "gated-bf16:7"],
    "listed": [
        "given:0",
        "given:24",
        "given-blocks:7",
        "given-gelu-batch:5",
        "down:1",
        "down-blocks:10",
        "down-batch:7:3",
    ],
}


def simulate(*names: str, module: str = "tests.kernels.cuda_cases") -> list[str]:
    """Lines that a module of cases prints, run as a program on the simulator."""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_kernels_equal_float64(group: str) -> None:
    names = GROUPS[group]
    assert simulate(*names) == [f"{name} ok" for name in names]
