"""Host side of the GPU timing that needs no GPU: phases of a trace."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from suite.schema import PHASES
from suite.speed.cases import make_cases
from suite.speed.gpu_timing import phase_rows


def test_phases_are_quantiles_over_the_blocks_of_all_layers_in_microseconds():
    cycles = torch.arange(0, 101)  # 101 blocks of two layers: 0 to 100 and 1000 to 1100 cycles
    layers = [{"fill": cycles, "choose": cycles * 0}, {"fill": cycles + 1000, "choose": cycles * 0}]
    bounds = [SimpleNamespace(layer=SimpleNamespace(phases=lambda one=one: one)) for one in layers]
    rows = phase_rows(bounds, cycles_per_us=10.0)
    assert [row["phase"] for row in rows] == ["fill", "choose"]
    assert rows[0]["us_median"] == pytest.approx((100 + 1000) / 2 / 10)
    assert (rows[0]["us_q05"], rows[0]["us_q95"]) == (pytest.approx(1.005), pytest.approx(108.995))
    assert {"cell_id", *rows[0]} == set(PHASES.names)


@pytest.mark.parametrize("variant", ["no-overlap", "deterministic", "trace"])
def test_variants_of_a_kernel_are_of_sparse_methods_on_a_gpu_alone(variant):
    more = {"backends": ["torch", "numba-cpu", "numba-cuda"], "variants": [variant], "clocks": ["graph"]}
    cases = make_cases(["llama-3.1-8b"], ["dense", "cats"], [0.5], dtypes=["bfloat16"], **more)
    assert {(case.method, case.device, case.variant) for case in cases if case.device == "cuda"} == {
        ("cats", "cuda", variant)
    }
    assert {case.variant for case in cases if case.device == "cpu"} == {"eager"}


def test_sums_in_one_order_are_a_variant_of_methods_that_select_by_a_dense_projection():
    more = {"backends": ["torch", "numba-cuda"], "variants": ["deterministic"], "clocks": ["graph"]}
    methods = ["dense", "cats", "m-countdown", "d-countdown", "given"]
    cases = make_cases(["llama-3.1-8b"], methods, [0.5], dtypes=["bfloat16"], **more)
    assert {case.method for case in cases} == {"cats", "m-countdown"}
