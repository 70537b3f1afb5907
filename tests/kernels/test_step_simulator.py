"""Attention and norms of a decode step on Numba's simulator against float64, and as PTX: no spills, no local memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.kernels.test_cuda_ptx import assert_clean, assert_spills, ptxas_needed
from tests.kernels.test_cuda_simulator import simulate

pytest.importorskip("numba.cuda", reason="needs numba-cuda or numba's own CUDA target")

# case:position of the token; the first and the last, both sides of a split and of a window
GROUPS = [
    ["norm", "norm-inner", "norm-fp16", "heads:0", "heads:3"],
    ["heads:511", "splits:255", "splits:256"],
    ["capped:37", "window:20", "window:280"],
    ["bf16:70"],
]
COMPILE = """
import sys
from unittest import mock
from numba import cuda
from kernels_numba.gpu.decode import add_rms_norm, attention
from kernels_numba.gpu.ptx import vectors
module = {module}
plan = module.{plan}
threads = getattr(plan, "threads", attention.THREADS)
with mock.patch("numba.cuda.dispatcher.get_current_device") as device:  # no GPU: device functions ask for its capability
    device.return_value.compute_capability = (9, 0)
    options = dict(device=False, abi="numba", cc=(9, 0), output="ptx", launch_bounds=(threads, 1))
    sys.stdout.write(cuda.compile(module.make_kernel(plan, vectors), module.SIGNATURE, **options)[0])
"""
PLANS = {
    "llama": ("attention", "AttentionPlan(8, 4, 128, 128, 512, 'bfloat16', 0.088)"),
    "gemma": (
        "attention",
        "AttentionPlan(8, 2, 256, 256, 1280, 'float16', 0.06, cap=50.0, window=4096, queries=2, split=256)",
    ),
    "norm": ("add_rms_norm", "NormPlan(3584, 'bfloat16', 1.0, 1e-6, True)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_equal_float64(names: list[str]) -> None:
    assert simulate(*names, module="tests.kernels.step_cases") == [f"{name} ok" for name in names]


@ptxas_needed
@pytest.mark.parametrize("name", PLANS)
def test_ptx(name: str, tmp_path) -> None:
    pytest.importorskip("cuda.bindings", reason="needs numba-cuda[cu13]")
    module, plan = PLANS[name]
    command = [sys.executable, "-c", COMPILE.replace("{module}", module).replace("{plan}", plan)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ld.relaxed.gpu.global.v4.b32" in done.stdout
    assert_clean(done.stdout)
    assert_spills(done.stdout, "90", tmp_path)
