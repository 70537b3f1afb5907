"""The CUDA masking kernel on Numba's simulator against a stable sort and thresholds: both widths, ties, NaN, infinities."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("numba.cuda", reason="needs numba-cuda or numba's own CUDA target")


@pytest.mark.slow
def test_dropped_as_by_a_stable_sort_and_by_thresholds() -> None:
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.masking_cases"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["ok"]
