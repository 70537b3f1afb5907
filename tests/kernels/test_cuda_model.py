"""Whole tiny models decoded by the CUDA kernels on Numba's simulator: padded batches share the union of their rows."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("numba.cuda", reason="needs numba-cuda or numba's own CUDA target")

GROUPS = [
    ["llama:m-countdown:2"],
    ["gemma2:cats:1", "phi3:d-countdown:1"],
    ["llama:m-countdown-cw:2", "gemma2:chess:1"],
]


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_generates_what_masked_generates(names: list[str]) -> None:
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.cuda_model", *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{name} ok" for name in names]
