"""CPU kernels against the float64 reference: shapes, active sets, NaN and inf."""

from __future__ import annotations

import math

import numba
import numpy as np
import pytest
import torch

from kernels_numba import cpu, cpu_kernels
from kernels_numba.reference import (
    LowRank,
    Reference,
    combine,
    error_bound,
    low_rank_scale,
    relative_error,
    wrongly_selected,
)

THREADS = sorted({1, min(2, numba.config.NUMBA_NUM_THREADS)})
SHAPES = [(8, 8), (24, 40), (72, 200), (64, 1), (1, 64), (13, 37), (129, 255), (576, 1536)]


def make(d_model, d_ff, seed=0):
    rng = np.random.default_rng([seed, d_model, d_ff])
    gate, up, down_t = (rng.standard_normal((d_ff, d_model), dtype=np.float32) for _ in range(3))
    return gate / d_model**0.5, up / d_model**0.5, down_t / d_ff**0.5, rng.standard_normal(d_model, dtype=np.float32)


def check(y, reference, active):
    expected = reference.output(active)
    assert relative_error(y, expected) <= reference.error_bound(expected, len(y), active)


def factors(d_ff, scaled=True):
    """Factors over two decades, as rms(a) has them, a twentieth of them 0; None if not ``scaled``."""
    rng = np.random.default_rng(7)
    values = np.exp(rng.uniform(-4, 1, d_ff)) * (rng.random(d_ff) > 0.05)
    return values.astype(np.float32) if scaled else None


def between(scores, kept):
    """Threshold between the kept largest scores and the rest."""
    ordered = np.sort(scores)[::-1]
    if kept == len(scores):
        return -math.inf
    return float(ordered[0] * 2 if kept == 0 else (ordered[kept - 1] + ordered[kept]) / 2)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(("d_model", "d_ff"), SHAPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("first", ["up", "gate"])
@pytest.mark.parametrize("scaled", [False, True])
def test_threshold_layer(d_model, d_ff, activation, first, threads, scaled):
    gate, up, down_t, x = make(d_model, d_ff)
    reference, scale = Reference.of(gate, up, down_t, x, activation), factors(d_ff, scaled)
    magnitudes = reference.scores(first)
    scores = magnitudes if scale is None else magnitudes * scale
    options = {"activation": activation, "first": first, "scale": scale, "threads": threads}
    layer = cpu.ThresholdLayer(gate, up, down_t, threshold=0.0, **options)
    for kept in sorted({0, 1, d_ff // 10, d_ff // 2, d_ff}):
        layer.threshold = between(scores, kept)
        out = np.full(d_model, np.nan, dtype=np.float32)
        assert layer(x, out) is out
        assert not len(wrongly_selected(magnitudes, layer.active, layer.threshold, d_model, scale))
        assert layer.count == len(layer.active)
        assert abs(layer.count - kept) <= 1
        assert list(layer.active) == sorted(layer.active)
        check(out, reference, layer.active)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("first", ["up", "gate"])
def test_a_score_equal_to_the_threshold_is_kept(first, activation):
    gate, up, down_t, x = make(8, 40)
    x[:] = np.arange(8) == 0
    whole = np.random.default_rng(3).permutation(40) + 100.0  # act(g) = g from 100 on, in fp32 and in float64
    (gate if first == "gate" else up)[:, 0] = whole
    layer = cpu.ThresholdLayer(gate, up, down_t, activation=activation, first=first, threshold=120.0)
    y = layer(x)
    assert list(layer.active) == list(np.flatnonzero(whole >= 120))
    reference = Reference.of(gate, up, down_t, x, activation)
    assert list(reference.active(first, 120.0)) == list(layer.active)
    check(y, reference, layer.active)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("first", ["up", "gate"])
def test_a_factor_decides_by_the_fp32_product(first, activation):
    """Scores a rounding apart: the threshold is one of them, which is kept, and so is what equals it after rounding."""
    gate, up, down_t, x = make(8, 40)
    x[:] = np.arange(8) == 0
    whole = np.random.default_rng(3).permutation(40) + 100.0  # act(g) = g from 100 on, in fp32 and in float64
    (gate if first == "gate" else up)[:, 0] = whole
    scale = (np.float32(1) / whole).astype(np.float32) * np.float32(3)
    scale[whole == 139] = 0
    products = whole.astype(np.float32) * scale
    threshold = float(np.sort(products)[20])
    layer = cpu.ThresholdLayer(
        gate, up, down_t, activation=activation, first=first, threshold=threshold, scale=torch.from_numpy(scale)
    )
    y = layer(x)
    assert list(layer.active) == list(np.flatnonzero(products >= np.float32(threshold)))
    assert 0 < layer.count < 39
    check(y, Reference.of(gate, up, down_t, x, activation), layer.active)
    layer.threshold = 0.0  # a score of 0 is not below it
    layer(x)
    assert layer.count == 40
    layer.threshold = np.nextafter(0.0, 1.0, dtype=np.float32)
    layer(x)
    assert list(layer.active) == list(np.flatnonzero(whole != 139))


def approximation(d_model, d_ff, rank, seed=5):
    """A low rank of random matrices; a twentieth of the residuals are 0, as those of dead neurons."""
    rng = np.random.default_rng(seed)
    v = rng.standard_normal((d_model, rank), dtype=np.float32) / np.float32(d_model**0.5)
    u = rng.standard_normal((d_ff, rank), dtype=np.float32) / np.float32(rank**0.5)
    residual = np.exp(rng.uniform(-8, 0, d_ff)) * (rng.random(d_ff) > 0.05)
    return LowRank(torch.from_numpy(v), torch.from_numpy(u), torch.from_numpy(residual.astype(np.float32)))


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(
    ("d_model", "d_ff", "rank"), [(8, 8, 1), (13, 37, 13), (64, 1, 3), (72, 200, 16), (576, 1536, 64)]
)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("first", ["up", "gate"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_factors_of_a_low_rank(d_model, d_ff, rank, activation, first, threads, elsewhere):
    """Of each token, by what the layer or another vector tells of the other projection."""
    gate, up, down_t, x = make(d_model, d_ff)
    low, seen = approximation(d_model, d_ff, rank), make(d_model, d_ff, seed=1)[3]
    reference = Reference.of(gate, up, down_t, x, activation)
    scale = low_rank_scale(low, seen if elsewhere else x, activation if first == "up" else None)
    magnitudes = reference.scores(first)
    options = {"activation": activation, "first": first, "threads": threads, "low_rank": low}
    layer = cpu.ThresholdLayer(gate, up, down_t, threshold=0.0, **options)
    layer(make(d_model, d_ff, seed=2)[3])  # leaves nothing behind
    for kept in sorted({0, 1, d_ff // 10, d_ff // 2, d_ff}):
        layer.threshold = between(magnitudes * scale, kept)
        out = np.full(d_model, np.nan, dtype=np.float32)
        assert layer(x, out, **({"seen": seen} if elsewhere else {})) is out
        assert not len(wrongly_selected(magnitudes, layer.active, layer.threshold, d_model, scale, rank))
        assert abs(layer.count - kept) <= 1
        check(out, reference, layer.active)
    plain = cpu.ThresholdLayer(gate, up, down_t, threshold=0.0, activation=activation, first=first, threads=threads)
    assert layer.extra_bytes - plain.extra_bytes == 4 * (rank * (d_model + d_ff + 1) + 2 * d_ff)


def test_tokens_of_a_batch_have_factors_of_their_own():
    gate, up, down_t, _ = (torch.from_numpy(part) for part in make(24, 40))
    x, seen = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0)).unbind()
    low = approximation(24, 40, 4)
    layer = cpu.ThresholdLayer(gate, up, down_t, activation="silu", first="up", threshold=0.3, low_rank=low)
    y = layer(x, seen=seen)
    assert torch.equal(y, torch.stack([layer(one, seen=read) for one, read in zip(x, seen, strict=True)]))
    assert not torch.equal(y, layer(x))
    assert torch.isnan(layer(x, seen=torch.full_like(x, math.nan))).logical_not().all()  # kept, and x is finite
    assert layer.count == 3 * 40


def test_factors_of_one_change_nothing():
    gate, up, down_t, x = make(72, 200)
    plain, scaled = (
        cpu.ThresholdLayer(gate, up, down_t, activation="silu", first="up", threshold=0.5, scale=scale)
        for scale in (None, np.ones(200, dtype=np.float32))
    )
    assert np.array_equal(plain(x), scaled(x))
    assert np.array_equal(plain.active, scaled.active)
    assert scaled.extra_bytes == plain.extra_bytes + 4 * 200


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(("d_model", "d_ff"), SHAPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_given_layer(d_model, d_ff, activation, dtype, threads):
    gate, up, down_t, x = make(d_model, d_ff)
    reference = Reference.of(gate, up, down_t, x, activation)
    layer = cpu.GivenLayer(gate, up, down_t, activation=activation, threads=threads)
    order = np.random.default_rng(1).permutation(d_ff).astype(dtype)
    for kept in sorted({0, 1, d_ff // 3, d_ff}):
        out = np.full(d_model, np.nan, dtype=np.float32)
        layer(x, order[:kept], out)
        assert layer.count == kept
        check(out, reference, order[:kept])


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(("d_model", "d_ff"), SHAPES)
def test_sparse_down_proj(d_model, d_ff, threads):
    _, _, down_t, _ = make(d_model, d_ff)
    rng = np.random.default_rng(2)
    values, order = rng.standard_normal(d_ff, dtype=np.float32), rng.permutation(d_ff)
    for count in sorted({0, 1, d_ff // 3, d_ff}):
        y = cpu.sparse_down_proj(values, order, count, down_t, threads=threads)
        expected = combine(values[:count], order[:count], down_t)
        bound = error_bound(expected, values[:count], order[:count], down_t)
        assert relative_error(y, expected) <= bound


def test_entries_beyond_the_count_are_not_read():
    _, _, down_t, _ = make(24, 40)
    values = np.full(40, np.nan, dtype=np.float32)
    values[:3] = 1.0
    indices = np.full(40, 10**6)
    indices[:3] = [4, 0, 39]
    y = cpu.sparse_down_proj(values, indices, 3, down_t)
    expected = down_t[[4, 0, 39]].astype(np.float64).sum(0)
    assert relative_error(y, expected) <= error_bound(expected, values[:3], indices[:3], down_t)


def test_threshold_zero_sparsity_equals_the_torch_layer():
    gate, up, down_t, x = (torch.from_numpy(a) for a in make(72, 200))
    layer = cpu.ThresholdLayer(gate, up, down_t, activation="silu", first="up", threshold=-math.inf)
    y = layer(x)
    reference = Reference.of(*(a.numpy() for a in (gate, up, down_t, x)), "silu")
    bound = reference.error_bound(reference.output(), 72)
    dense = (torch.nn.functional.silu(gate @ x) * (up @ x)) @ down_t
    assert isinstance(y, torch.Tensor)
    assert layer.count == 200
    # both are within the bound of the exact value
    assert (y - dense).abs().max() <= 2.01 * bound * dense.abs().max()


def test_torch_weights_are_bound_without_a_copy():
    gate, up, down_t, x = (torch.from_numpy(a) for a in make(24, 40))
    layer = cpu.ThresholdLayer(gate, up, down_t, activation="silu", first="up", threshold=-math.inf)
    assert layer.w_gate.ctypes.data == gate.data_ptr()
    before = layer(x).clone()
    down_t *= 2
    assert torch.equal(layer(x), 2 * before)
    assert layer.extra_bytes >= down_t.numel() * 4


def test_tokens_of_a_batch_have_their_own_active_sets():
    gate, up, down_t, _ = (torch.from_numpy(a) for a in make(24, 40))
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    layer = cpu.ThresholdLayer(gate, up, down_t, activation="silu", first="gate", threshold=0.3)
    y = layer(x)
    count = layer.count
    each = [layer(token) for token in x.reshape(-1, 24)]
    assert y.shape == x.shape
    assert torch.equal(y.reshape(-1, 24), torch.stack(each))
    counts = []
    for token in x.reshape(-1, 24):
        layer(token)
        counts.append(layer.count)
    assert count == sum(counts)
    assert len(set(counts)) > 1


def test_result_does_not_depend_on_the_call_before():
    gate, up, down_t, x = make(72, 200)
    layer = cpu.ThresholdLayer(gate, up, down_t, activation="silu", first="up", threshold=0.5)
    before, count = layer(x).copy(), layer.count
    layer(np.full_like(x, np.nan))
    assert layer.count == 200
    assert np.array_equal(layer(x), before)
    assert layer.count == count


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("first", ["up", "gate"])
@pytest.mark.parametrize("place", [0, 37, 71])
@pytest.mark.parametrize("scaled", [False, True])
def test_nan_in_x_gives_nan_in_y(activation, first, place, scaled):
    gate, up, down_t, x = make(72, 200)
    x[place] = np.nan
    for threshold in (-math.inf, 0.5, 1e30, math.inf):
        layer = cpu.ThresholdLayer(
            gate, up, down_t, activation=activation, first=first, threshold=threshold, scale=factors(200, scaled)
        )
        assert np.isnan(layer(x)).all()
        assert layer.count == 200
    given = cpu.GivenLayer(gate, up, down_t, activation=activation)
    assert np.isnan(given(x, np.array([3, 150]))).all()
    values = np.array([1.0, np.nan, 1.0], dtype=np.float32)
    assert np.isnan(cpu.sparse_down_proj(values, np.arange(3), 3, down_t)).all()


def test_nan_in_one_weight_reaches_what_it_decides():
    gate, up, down_t, x = make(72, 200)
    up[7, 3] = np.nan
    layer = cpu.ThresholdLayer(gate, up, down_t, activation="silu", first="up", threshold=1e30)
    assert np.isnan(layer(x)).all()
    assert list(layer.active) == [7]


def test_infinite_input_never_gives_a_finite_value_where_the_reference_has_none():
    gate, up, down_t, x = make(72, 200)
    x[5] = np.inf
    reference = Reference.of(gate, up, down_t, x, "silu")
    y = cpu.ThresholdLayer(gate, up, down_t, activation="silu", first="up", threshold=0.5)(x)
    with np.errstate(invalid="ignore"):
        expected = reference.output()
    assert not np.isfinite(expected).any()
    assert not np.isfinite(y).any()


def test_large_gates_do_not_overflow():
    gate, up, down_t, x = make(24, 40)
    gate *= 1e4
    reference = Reference.of(gate, up, down_t, x, "silu")
    y = cpu.GivenLayer(gate, up, down_t, activation="silu")(x, np.arange(40))
    check(y, reference, np.arange(40))
    reference = Reference.of(gate, up, down_t, x, "gelu_tanh")
    y = cpu.GivenLayer(gate, up, down_t, activation="gelu_tanh")(x, np.arange(40))
    check(y, reference, np.arange(40))


@pytest.mark.parametrize("shape", [(8, 8), (13, 37), (72, 200)])
def test_transpose_down(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    t = cpu.transpose_down(w)
    assert t.is_contiguous()
    assert torch.equal(t, w.t())
    assert np.array_equal(cpu.transpose_down(w.numpy()), w.numpy().T)


def test_reference_agrees_with_torch_in_double():
    gate, up, down_t, x = make(72, 200)
    for activation, act in (
        ("silu", torch.nn.functional.silu),
        ("gelu_tanh", lambda g: torch.nn.functional.gelu(g, approximate="tanh")),
    ):
        g, u, d, v = (torch.from_numpy(a).double() for a in (gate, up, down_t, x))
        expected = (act(g @ v) * (u @ v)) @ d
        y = Reference.of(gate, up, down_t, x, activation).output()
        assert np.allclose(y, expected.numpy(), rtol=1e-12, atol=1e-14)


def test_the_bound_finds_one_missing_neuron():
    gate, up, down_t, x = make(576, 1536)
    reference = Reference.of(gate, up, down_t, x, "silu")
    v = np.abs(reference.act * reference.up)
    for dropped in (int(v.argmax()), int(np.argsort(v)[len(v) // 2])):
        active = np.delete(np.arange(1536), dropped)
        y = cpu.GivenLayer(gate, up, down_t, activation="silu")(x, active)
        assert relative_error(y, reference.output()) > 10 * reference.error_bound(reference.output(), 576)


@pytest.mark.parametrize("size", [5, 4 * 16384, 300_001])
def test_the_ceiling_reads_every_element(size):
    buffer = np.ones(size, dtype=np.float32)
    sums = np.zeros(THREADS[-1], dtype=np.float32)
    numba.set_num_threads(THREADS[-1])
    cpu_kernels.read_all(buffer, sums)
    assert sums.sum() == size  # whole numbers below 2**24 are exact
