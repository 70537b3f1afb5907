"""CPU cases end to end on a tiny layer: rows, checks and what a wrong kernel leads to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kernels_numba import cpu as kernels
from suite import schema
from suite.decoding.shapes import SHAPES, Shape
from suite.speed import clock, layer_cpu
from suite.speed.bench import benchmark, default_methods, run_group
from suite.speed.case import DISTURBED, needed_bytes
from suite.speed.clock import Rounds
from suite.speed.expand import make_cases

D_MODEL, D_FF = 72, 200  # above the default rank of factors


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A tiny shape, few layers, a small buffer and no waiting: what is computed stays the same."""
    monkeypatch.setitem(SHAPES, "tiny", Shape(D_MODEL, D_FF))
    monkeypatch.setitem(SHAPES, "tiny-gelu", Shape(D_MODEL, D_FF, "gelu_tanh"))
    monkeypatch.setattr(layer_cpu, "_MIN_WORKING_SET", 3 * 12 * D_MODEL * D_FF)
    monkeypatch.setattr(layer_cpu, "last_level_cache_bytes", lambda: 1 << 10)
    monkeypatch.setattr(clock, "last_level_cache_bytes", lambda: 1 << 10)
    monkeypatch.setattr(layer_cpu, "_SETTLE_S", 0.0)
    monkeypatch.setattr(clock, "_MIN_BUFFER", 1 << 16)
    monkeypatch.setattr(layer_cpu.CpuSubject, "rounds", Rounds(5, 5))


METHODS = ("dense", "cats", "m-countdown", "given")
SCALED = ("m-countdown-cw", "chess")  # a factor a neuron


def tiny_cases(level="layer", shape="tiny", threads=1, methods=METHODS, **options):
    return make_cases([shape], list(methods), [0.0, 0.5, 0.9], level=level, threads=[threads], **options)


@pytest.mark.parametrize(("level", "shape"), [("layer", "tiny"), ("layer", "tiny-gelu"), ("op", "tiny")])
def test_every_case_is_checked_and_timed(level, shape):
    cases = tiny_cases(level, shape)
    rows = run_group(cases)
    assert len(rows) == len(cases) == (10 if level == "layer" else 4)
    for case, row in zip(cases, rows, strict=True):
        assert set(row) == {*schema.SPEED.names, "timings"} - {"run_id", "cell_id"}
        assert (row["status"], row["check"]) == ("ok", "passed")
        assert row["reason"] in ("", DISTURBED)  # this machine may be busy
        assert (row["method"], row["sparsity_target"], row["backend"]) == (case.method, case.sparsity, case.backend)
        # realised from counts: exactly floor(s * d_ff) of 200 neurons are skipped
        assert row["sparsity_realized"] == pytest.approx(math.floor(case.sparsity * D_FF) / D_FF, abs=1e-12)
        assert row["latency_us_min"] <= row["latency_us_q25"] <= row["latency_us_median"] <= row["latency_us_q75"]
        assert row["latency_us_min"] > 0
        assert row["rounds"] == 5
        assert row["bytes_read_mib"] * 2**20 == pytest.approx(needed_bytes(case, row["sparsity_realized"]))
        at_bandwidth = row["bytes_read_mib"] * 2**20 / (row["read_bandwidth_gb_s"] * 1e9)
        assert row["efficiency"] == pytest.approx(at_bandwidth / (row["latency_us_median"] * 1e-6))
        assert 0 <= row["max_rel_error"] < 1e-4
        assert (row["jit_s"] is None) == (case.backend == "torch")
        assert (row["extra_memory_mib"] > 0) == (case.backend == "numba-cpu")
        assert (row["clock"], row["cache"], row["threads"]) == ("wall", "cold", 1)
        assert row["driver_version"] == ""
        assert row["device_name"]


def test_a_factor_is_made_of_the_layer_and_decides(monkeypatch):
    seen = []
    make = kernels.ThresholdLayer.__init__

    def watched(self, *weights, scale=None, **options):
        seen.append(scale)
        make(self, *weights, scale=scale, **options)

    monkeypatch.setattr(kernels.ThresholdLayer, "__init__", watched)
    for row in run_group(tiny_cases(methods=SCALED)):
        assert (row["status"], row["check"]) == ("ok", "passed")
        assert row["sparsity_realized"] == pytest.approx(math.floor(row["sparsity_target"] * D_FF) / D_FF, abs=1e-12)
    assert all(scale.shape == (D_FF,) and len(scale.unique()) > D_FF // 2 for scale in seen)

    def forgetful(self, *weights, scale=None, **options):
        make(self, *weights, **options)

    monkeypatch.setattr(kernels.ThresholdLayer, "__init__", forgetful)
    for row in run_group(tiny_cases(methods=SCALED)):
        assert (row["check"] == "failed") == (row["sparsity_target"] > 0)
        assert row["check"] == "passed" or "wrongly kept or dropped" in row["reason"]


@pytest.mark.parametrize(
    ("mutant", "broken"),
    [
        ("dropped neuron", {"cats", "m-countdown"}),
        ("stale output", {"cats", "m-countdown"}),
        ("wrong activation", {"cats", "m-countdown"}),
        ("keeps too many", {"cats", "m-countdown"}),
        ("dropped tail", {"given"}),
    ],
)
def test_a_wrong_kernel_fails_its_check_and_has_no_time(monkeypatch, mutant, broken):
    threshold_call, given_call = kernels.ThresholdLayer.__call__, kernels.GivenLayer.__call__

    def dropped_neuron(self, x, out=None):
        kept = threshold_call(self, x, out)
        v_rows = self.w_down_t[self.active[-1]]
        i = self.active[-1]
        gate, up = float(self.w_gate[i] @ x), float(self.w_up[i] @ x)
        out -= np.float32(gate / (1 + math.exp(-gate)) * up) * v_rows
        return kept

    def stale_output(self, x, out=None):
        return out

    def wrong_activation(self, x, out=None):
        self._kind = 1 - self._kind
        try:
            return threshold_call(self, x, out)
        finally:
            self._kind = 1 - self._kind

    def keeps_too_many(self, x, out=None):
        fitted, self.threshold = self.threshold, 0.5 * self.threshold
        try:
            return threshold_call(self, x, out)
        finally:
            self.threshold = fitted

    def dropped_tail(self, x, active, out=None):
        return given_call(self, x, active[:-1], out)

    mutants = {
        "dropped neuron": (kernels.ThresholdLayer, dropped_neuron),
        "stale output": (kernels.ThresholdLayer, stale_output),
        "wrong activation": (kernels.ThresholdLayer, wrong_activation),
        "keeps too many": (kernels.ThresholdLayer, keeps_too_many),
        "dropped tail": (kernels.GivenLayer, dropped_tail),
    }
    target, replacement = mutants[mutant]
    monkeypatch.setattr(target, "__call__", replacement)
    for row in run_group(tiny_cases()):
        if row["method"] in broken and row["sparsity_target"] > 0:
            assert (row["status"], row["check"]) == ("failed", "failed"), row["method"]
            assert "check failed" in row["reason"]
            for column in ("latency_us_median", "latency_us_min", "efficiency", "rounds", "sparsity_realized"):
                assert row[column] is None
        elif row["method"] not in broken:
            assert row["status"] == "ok"


def test_what_the_cpu_cannot_do_is_skipped_with_the_reason():
    rows = run_group(tiny_cases(dtypes=["bfloat16"]))
    assert {row["status"] for row in rows} == {"skipped"}
    assert {row["reason"] for row in rows} == {"dtype bfloat16: the CPU kernels are float32 only"}
    assert "batch size 4" in run_group(tiny_cases(batch_sizes=[4]))[0]["reason"]


def test_too_little_memory_is_said(monkeypatch):
    monkeypatch.setattr(layer_cpu, "memory_needed", lambda case: 1 << 60)
    rows = run_group(tiny_cases())
    assert {row["status"] for row in rows} == {"skipped"}
    assert "GiB of memory" in rows[0]["reason"]


def test_weights_follow_from_the_seed_alone():
    case = tiny_cases()[0]

    def layer(seed, index):
        draw = layer_cpu.random_draw(seed, 1, index)
        return layer_cpu.LayerData.random(case, None, draw, kernels.transpose_down, torch.float32)

    one, again, other = layer(0, 0), layer(0, 0), layer(1, 0)
    assert np.array_equal(one.w_gate, again.w_gate)
    assert np.array_equal(one.x, again.x)
    assert not np.array_equal(one.w_gate, other.w_gate)
    assert not np.array_equal(one.w_gate, layer(0, 1).w_gate)


def test_layers_rotate_over_more_than_twice_the_last_level_cache(monkeypatch):
    case = tiny_cases()[0]
    for cache in (1 << 20, 1 << 24):
        monkeypatch.setattr(layer_cpu, "last_level_cache_bytes", lambda cache=cache: cache)
        assert layer_cpu.layer_count(case) * 12 * D_MODEL * D_FF > 2 * cache
    assert layer_cpu.layer_count(make_cases(["phi-4"], ["dense"], [0.0])[0]) == 2


def test_progress_is_told():
    told = []
    run_group(tiny_cases()[:2], progress=told.append)
    assert any("check" in text for text in told)
    assert told[-1] == "round 5"


def test_benchmark_returns_the_columns_of_speed_csv():
    frame = benchmark(["tiny"], sparsities=[0.9], threads=1)
    assert list(frame.columns) == schema.SPEED.names[2:]
    assert list(frame["method"]) == default_methods()
    assert {"dense", "cats", "m-countdown", "given"} <= set(default_methods())
    assert (frame["status"] == "ok").all()


OWN = "tests.speed.own_methods:"


@pytest.mark.parametrize(
    "method", ["s-countdown", "d-countdown", "dejavu", "dejavu-abs", OWN + "MagnitudeOfGate", OWN + "Predicted"]
)
def test_a_method_is_timed_by_what_its_contract_says(method):
    row = benchmark(["tiny"], [method], [0.9], threads=1).iloc[0]
    assert (row["method"], row["mode"], row["check"], row["status"]) == (method, "practical", "passed", "ok")
    # a predictor of rank 512 is read beside 3 matrices of what is kept; a first projection whole, and 2 of what is kept
    needed = 0.3 * D_MODEL * D_FF + 512 * (D_MODEL + D_FF)
    if method.endswith("Gate"):
        needed = 1.2 * D_MODEL * D_FF
    assert row["bytes_read_mib"] * 2**20 == pytest.approx(4 * needed)
    assert row["sparsity_realized"] == pytest.approx(0.9)
    assert row["latency_us_median"] > 0


def test_a_score_that_no_kernel_computes_is_skipped_with_the_reason():
    (row,) = benchmark(["tiny"], ["tests.contract.third_party:PowerOfUp"], [0.9], threads=1).to_dict("records")
    assert (row["status"], row["latency_us_median"]) == ("skipped", None)
    assert "do not compute the score of tests.contract.third_party:PowerOfUp" in row["reason"]


def test_a_predictor_that_names_wrong_neurons_fails_its_check(monkeypatch):
    right = layer_cpu.LayerData.logits
    monkeypatch.setattr(
        layer_cpu.LayerData,
        "logits",
        lambda self, case, x, dtype: right(self, case, x, dtype).roll(int(dtype == torch.float32), -1),
    )
    row = benchmark(["tiny"], ["s-countdown"], [0.9], threads=1).iloc[0]
    assert (row["check"], row["latency_us_median"]) == ("failed", None)
    assert "wrongly kept or dropped" in row["reason"]


FACTORS = [("md-countdown", {"rank": 8}), ("md-countdown", {"rank": 24, "exact": "gate"})]
FIXED = ("static", "griffin")


def test_factors_of_a_low_rank_are_timed_and_counted(monkeypatch):
    """Two ranks and both projections in one group, with predictors of both kinds beside them."""
    methods = [*FACTORS, "d-countdown", "dejavu-abs", "dejavu"]
    cases = tiny_cases(shape="tiny-gelu", methods=methods, predictors=["low-rank", "gated"])
    rows = run_group(cases)
    names = ("method", "rank", "predictor", "predictor_input", "exact_projection")
    assert all(row["exact_chosen"] == row["exact_projection"] for row in rows)
    assert list(dict.fromkeys(tuple(row[name] for name in names) for row in rows)) == [
        ("md-countdown", 8, None, "mlp", "up"),
        ("md-countdown", 24, None, "mlp", "gate"),
        ("d-countdown", 512, None, None, None),
        ("d-countdown", 254, "gated", "mlp", None),
        ("dejavu-abs", 512, None, None, None),
        ("dejavu-abs", 510, "gated", "mlp", None),
        ("dejavu", 512, None, None, None),
    ]
    for case, row in zip(cases, rows, strict=True):
        assert (row["status"], row["check"]) == ("ok", "passed"), row["reason"]
        assert row["sparsity_realized"] == pytest.approx(math.floor(case.sparsity * D_FF) / D_FF, abs=1e-12)
        n, kept = len(case.predicted), 1 - row["sparsity_realized"]
        if case.method == "md-countdown":
            extra = (1 + 2 * kept) * D_MODEL * D_FF + case.rank * (D_MODEL + D_FF) + D_FF
        else:
            extra = 3 * kept * D_MODEL * D_FF + max(n, 1) * case.rank * (D_MODEL + D_FF) + n * D_FF
        assert row["bytes_read_mib"] * 2**20 == pytest.approx(4 * extra)
    assert len({case.label for case in cases}) == len(cases)

    make = kernels.ThresholdLayer.__init__
    forgetful = lambda self, *weights, low_rank=None, **options: make(self, *weights, **options)  # noqa: E731
    monkeypatch.setattr(kernels.ThresholdLayer, "__init__", forgetful)
    for row in run_group(tiny_cases(methods=FACTORS)):
        assert (row["check"] == "failed") == (row["sparsity_target"] > 0)


@pytest.mark.parametrize("method", FIXED)
def test_a_fixed_set_is_a_smaller_dense_layer_in_torch(method):
    cases = tiny_cases(methods=[method, "dense"])
    for case, row in zip(cases, run_group(cases), strict=True):
        assert (row["status"], row["check"], row["backend"], row["jit_s"]) == ("ok", "passed", "torch", None)
        assert row["sparsity_realized"] == pytest.approx(math.floor(case.sparsity * D_FF) / D_FF, abs=1e-12)
        weights = 3 * (1 - row["sparsity_realized"]) * D_MODEL * D_FF * 4 / 2**20
        assert row["bytes_read_mib"] == pytest.approx(weights)
        assert row["extra_memory_mib"] == (pytest.approx(weights) if case.method == method else 0)


def test_a_fixed_set_of_wrong_neurons_fails_its_check(monkeypatch):
    right = layer_cpu.LayerData.gathered
    monkeypatch.setattr(layer_cpu.LayerData, "gathered", lambda *one: (right(*one)[0].roll(1) // 2, right(*one)[1]))
    (row,) = run_group(tiny_cases(methods=["static"])[2:])
    assert row["check"] == "failed"
