"""Host side of the GPU timing that needs no GPU: phases of a trace, and the rig with kernels in torch."""

from __future__ import annotations

import pytest
import torch

from suite.decoding.shapes import SHAPES, Shape
from suite.schema import PHASES
from suite.speed.bench import run_group
from suite.speed.case import needed_bytes
from suite.speed.clock import Rounds
from suite.speed.expand import make_cases
from suite.speed.layer import phase_rows
from tests.speed import cuda_stand_in


def test_phases_are_quantiles_over_the_blocks_of_all_layers_in_microseconds():
    cycles = torch.arange(0, 101)  # 101 blocks of two layers: 0 to 100 and 1000 to 1100 cycles
    layers = [{"fill": cycles, "choose": cycles * 0}, {"fill": cycles + 1000, "choose": cycles * 0}]
    rows = phase_rows(layers, cycles_per_us=10.0)
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


@pytest.fixture
def rig(monkeypatch):
    """The CUDA rig on a CPU, with kernels in torch."""
    layer_cuda = pytest.importorskip("suite.speed.layer_cuda")
    for name in ("ThresholdLayer", "PredictorLayer", "GivenLayer"):
        monkeypatch.setattr(layer_cuda.kernels, name, cuda_stand_in.Kernel)
    monkeypatch.setattr(layer_cuda, "DownProjection", cuda_stand_in.Projection)
    compiled = []
    monkeypatch.setattr(layer_cuda, "compile_together", lambda plans, threads: compiled.extend(plans))
    monkeypatch.setattr(layer_cuda, "compiled_dense", lambda: layer_cuda.dense_layer)
    monkeypatch.setattr(layer_cuda, "captured", cuda_stand_in.captured)
    monkeypatch.setattr(layer_cuda, "cuda_bandwidth", cuda_stand_in.small_bandwidth)
    monkeypatch.setattr(layer_cuda, "clock_rate", lambda: 10.0)
    monkeypatch.setattr(layer_cuda.CudaSubject, "rounds", Rounds(3, 3))
    monkeypatch.setitem(SHAPES, "tiny", Shape(40, 200))
    with cuda_stand_in.play_gpu(monkeypatch):
        yield compiled


SCALED = ("m-countdown-cw", "chess")  # a factor for each neuron
FACTORS = [("md-countdown", {"rank": 8}), ("md-countdown", {"rank": 24, "exact": "gate"})]
METHODS = ["dense", "cats", "m-countdown", *SCALED, *FACTORS, "d-countdown", "s-countdown", "given", "griffin"]


def timed(methods=tuple(METHODS), **more):
    options = {"backends": ["torch", "numba-cuda"], "clocks": ["graph"], "dtypes": ["bfloat16"]} | more
    cases = make_cases(["tiny"], methods, [0.5], **options)
    return [(case, row) for case, row in zip(cases, run_group(cases), strict=True)]


@pytest.mark.parametrize(
    "more",
    [
        {"variants": ["eager", "compile"]},
        {"clocks": ["event"]},
        {"batch_sizes": [4]},
        {"level": "op"},
        {"dtypes": ["float32"]},
    ],
    ids=lambda more: next(iter(more)),
)
def test_every_cuda_case_is_checked_and_timed(rig, more):
    found = timed(**more)
    names = {case.method for case, _ in found}
    assert names == ({"dense", "given"} if more.get("level") == "op" else {*METHODS[:5], "md-countdown", *METHODS[7:]})
    for case, row in found:
        assert (row["status"], row["check"], row["threads"]) == ("ok", "passed", None), row["reason"]
        assert (row["device_name"], row["driver_version"]) == ("a GPU", "1.2")
        assert len(row["timings"]) == row["rounds"] == 3
        assert row["sparsity_realized"] == pytest.approx(case.sparsity, abs=1e-9)
        assert row["n_layers"] == 8
        kernel, compiled = case.backend == "numba-cuda", case.variant == "compile"
        assert (row["jit_s"] == 0.25, row["extra_memory_mib"] == 1) == (kernel, kernel)
        assert (row["extra_memory_mib"] is None) == (case.method == "dense")
        assert (row["jit_s"] is None) == (not kernel and not compiled)
        assert row["peak_memory_mib"] == 3
        assert (row["capture_s"] is None) == (case.clock == "event")
        assert row["bytes_read_mib"] * 2**20 == pytest.approx(needed_bytes(case, case.sparsity))
    assert len(rig) == sum(case.backend != "torch" for case, _ in found)


def test_phases_of_a_trace_are_read_after_the_timing(rig):
    ((_, row),) = timed(["cats"], variants=["trace"])
    assert [phase["phase"] for phase in row["phases"]] == ["fill", "rest"]
    assert row["phases"][0]["us_median"] == pytest.approx(0.2)


def test_a_wrong_cuda_kernel_fails_its_check_and_has_no_time(rig, monkeypatch):
    right = cuda_stand_in.Kernel.__call__

    def wrong(self, x, *rest):
        return right(self, x, *rest).mul_(1.1)

    monkeypatch.setattr(cuda_stand_in.Kernel, "__call__", wrong)
    for case, row in timed():
        assert row["check"] == ("passed" if case.backend == "torch" else "failed")
        assert (row["latency_us_median"] is None) == (case.backend != "torch")


def test_a_kernel_that_forgets_the_factor_fails_its_check(rig, monkeypatch):
    make = cuda_stand_in.Kernel.__init__
    forgetful = lambda self, *w, scale=None, low_rank=None, **named: make(self, *w, **named)  # noqa: E731
    monkeypatch.setattr(cuda_stand_in.Kernel, "__init__", forgetful)
    rows = [row for _, row in timed([*SCALED, *FACTORS])]
    assert rows
    assert all("wrongly kept or dropped" in row["reason"] for row in rows)


def test_what_the_kernels_cannot_take_is_skipped_with_the_reason(rig):
    reasons = {row["reason"] for _, row in timed(["cats"], batch_sizes=[9])}
    assert reasons == {"batch size 9: the CUDA kernels take 1 to 8 tokens"}


def test_a_gated_predictor_is_left_to_decode_rows(rig):
    ((_, low), (_, gated)) = timed(["d-countdown"], predictors=["low-rank", "gated"])
    assert (low["status"], gated["status"]) == ("ok", "skipped")
    assert gated["reason"] == "no kernel computes a gated predictor within a layer: time it at level decode"
