"""Deliberately wrong kernels, each of which the simulator's comparison with float64 must catch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("numba.cuda", reason="needs numba-cuda or numba's own CUDA target")


@pytest.mark.slow
@pytest.mark.parametrize("third", [0, 1, 2])
def test_every_mutant_is_caught(third: int) -> None:
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    code = "from tests.kernels.cuda_mutants import MUTANTS; import sys; sys.stdout.write(' '.join(MUTANTS))"
    names = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()[third::3]
    assert len(names) >= 10
    command = [sys.executable, "-m", "tests.kernels.cuda_mutants", *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{name} caught" for name in names]
