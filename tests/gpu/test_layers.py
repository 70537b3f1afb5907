"""CUDA layers on a GPU against float64: every kind, dtype, activation, batch and edge count. ``pytest tests/gpu``."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from kernels_numba.gpu.host.down_proj import DownProjection, sparse_down_proj
from kernels_numba.gpu.host.gated import GatedPredictorLayer
from kernels_numba.gpu.host.layers import GivenLayer, PredictorLayer, ThresholdLayer, transpose_down
from kernels_numba.reference import Gated, LowRank

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FIRST = {"up": "up", "gate": "gate", "cw": "up", "chess": "gate"}
SCALED = ("cw", "chess")  # with a factor a neuron
PREDICTORS = ("predictor", "gated", "gated-gate")
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


class Weights:
    def __init__(self, d_model, d_ff, dtype, rank=64, seed=0):
        generator = torch.Generator(device="cuda").manual_seed(seed)

        def normal(*shape):
            return (torch.randn(*shape, device="cuda", generator=generator) * shape[-1] ** -0.5).to(dtype)

        self.gate, self.up, self.down = normal(d_ff, d_model), normal(d_ff, d_model), normal(d_model, d_ff)
        self.down_t, self.v, self.u = transpose_down(self.down), normal(rank, d_model), normal(d_ff, rank)
        self.scale = torch.exp(-4 * torch.rand(d_ff, device="cuda", generator=generator))  # fp32, over two decades
        self.scale[::20] = 0
        own = max(1, rank // 3)  # of up, so that the parts differ
        matrices = {"gate": (self.v.T, self.u), "up": (normal(own, d_model).T, normal(d_ff, own))}
        parts = {name: LowRank(*pair, self.scale * 2.0 ** -len(name)) for name, pair in matrices.items()}
        self.gated = {"gated": Gated(**parts), "gated-gate": Gated(parts["gate"], None, act=False)}
        self.dtype, self.d_model, self.d_ff = dtype, d_model, d_ff

    def x(self, n, seed=1):
        generator = torch.Generator(device="cuda").manual_seed(seed)
        return torch.randn(n, self.d_model, device="cuda", generator=generator).to(self.dtype)

    def products(self, x, activation):
        gate, up = x.double() @ self.gate.double().T, x.double() @ self.up.double().T
        act = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
        return act, up

    def scores(self, method, x, activation):
        if method in self.gated:
            return self.gated[method].logits(x.double(), activation)
        if method == "predictor":
            return (x.double() @ self.v.double().T) @ self.u.double().T
        act, up = self.products(x, activation)
        magnitudes = (act if FIRST[method] == "gate" else up).abs()
        return magnitudes * self.scale if method in SCALED else magnitudes

    def layer(self, method, activation, threshold, *, deterministic=False):
        if method in PREDICTORS:
            kind, given = PredictorLayer, (self.v, self.u)
            if method in self.gated:
                kind, given = GatedPredictorLayer, (self.gated[method],)
            return kind(self.gate, self.up, self.down_t, *given, activation=activation, threshold=threshold)
        options = {"first": FIRST[method], "scale": self.scale if method in SCALED else None}
        options |= {"activation": activation, "threshold": threshold, "deterministic": deterministic}
        return ThresholdLayer(self.gate, self.up, self.down_t, **options)


def bound(n, dtype, d_model):
    limit = 4 * 2.0**-24 * (math.sqrt(2 * d_model) + math.sqrt(max(1, n)) + 2)
    return limit + (2 * UNIT[dtype] if dtype != torch.float32 else 0)


def agrees(got, expected, n, dtype, d_model):
    limit = bound(n, dtype, d_model)
    error = ((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    assert error <= limit, f"error {error:.3g} over {limit:.3g}"


def check(weights, layer, method, activation, x, residual=None):
    out = torch.full_like(x, math.nan)
    layer(x, out, residual=residual)
    act, up = weights.products(x, activation)
    scores, mask = weights.scores(method, x, activation), torch.zeros_like(up)
    for token in range(len(x)):
        active = layer.active(token)
        mask[token, active] = 1
        wrong = (mask[token] == 0) != (scores[token] < layer.threshold)
        assert (scores[token][wrong] - layer.threshold).abs().max().item() < 1e-4 if wrong.any() else True
    expected = (act * up * mask) @ weights.down.double().T + (0 if residual is None else residual.double())
    agrees(out, expected, int(mask.sum(1).max()), weights.dtype, weights.d_model)
    return mask


SHAPES = [(torch.bfloat16, "gelu_tanh", *shape) for shape in ((640, 1000), (3584, 2048), (5120, 1024), (8, 8))]
SHAPES += [(dtype, "silu", 576, 1536) for dtype in DTYPES] + [(torch.float32, "gelu_tanh", 4096, 512)]


# the method, and whether a layer that could claim rows while it runs is told not to
ORDERS = [(method, deterministic) for method in FIRST for deterministic in (False, True)]
ORDERS += [(method, False) for method in PREDICTORS]


@pytest.mark.parametrize(("dtype", "activation", "d_model", "d_ff"), SHAPES)
@pytest.mark.parametrize(("method", "deterministic"), ORDERS)
def test_layer_equals_float64(dtype, method, deterministic, activation, d_model, d_ff):
    weights = Weights(d_model, d_ff, dtype, rank=min(64, d_model))
    x = weights.x(1)
    threshold = float(weights.scores(method, x, activation).median())
    layer = weights.layer(method, activation, threshold, deterministic=deterministic)
    for _ in range(3):  # claims are counted in two counters by turns
        check(weights, layer, method, activation, x, weights.x(1, 5))


@pytest.mark.parametrize(("method", "deterministic"), ORDERS)
@pytest.mark.parametrize("kept", [0, 1, 7, "all"])
def test_edge_counts(method, deterministic, kept):
    weights = Weights(4096, 2000, torch.bfloat16)
    x = weights.x(1)
    top = weights.scores(method, x, "silu").flatten().sort(descending=True).values
    threshold = -math.inf if kept == "all" else float(top[0] * 2 + 1 if kept == 0 else (top[kept - 1] + top[kept]) / 2)
    layer = weights.layer(method, "silu", threshold, deterministic=deterministic)
    for _ in range(3):
        mask = check(weights, layer, method, "silu", x)
        assert mask.sum().item() == (2000 if kept == "all" else kept)


@pytest.mark.parametrize("method", [*FIRST, *PREDICTORS])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("d_model", [4096, 5120, 64])
def test_batch_keeps_each_tokens_own_set(method, n, d_model):
    weights = Weights(d_model, 1504, torch.bfloat16)
    x = weights.x(n)
    layer = weights.layer(method, "silu", float(weights.scores(method, x, "silu").flatten().quantile(0.8013)))
    if n <= layer._most:
        check(weights, layer, method, "silu", x)
    one = torch.cat([layer(x[i : i + 1]) for i in range(n)])
    agrees(layer(x), one.double(), 1504, torch.bfloat16, d_model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [256, 512, 800])  # of the gate, and a third of it: no zeros between them, or some
@pytest.mark.parametrize("n", [1, 2, 8])
def test_gated_predictors_of_many_ranks(dtype, rank, n):
    weights = Weights(1024, 1000, dtype, rank=rank)
    x = weights.x(n)
    layer = weights.layer("gated", "gelu_tanh", float(weights.scores("gated", x, "gelu_tanh").quantile(0.7013)))
    check(weights, layer, "gated", "gelu_tanh", x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 300, 1000])
def test_given_and_op(dtype, count):
    weights = Weights(1024, 1000, dtype)
    x = weights.x(1)
    indices = torch.randperm(1000, device="cuda").int()
    n = torch.tensor([count], dtype=torch.int32, device="cuda")
    out = torch.full_like(x, math.nan)
    act, up = weights.products(x, "silu")
    used = indices[:count].long()
    GivenLayer(weights.gate, weights.up, weights.down_t, activation="silu", checked=True)(x, indices, n, out)
    agrees(out, (act * up)[:, used] @ weights.down.double()[:, used].T, count, dtype, 1024)
    values = weights.x(2).contiguous()[:, :1000].contiguous()
    got = DownProjection(weights.down_t, checked=True)(values, indices, n)
    agrees(got, values.double()[:, :count] @ weights.down.double()[:, used].T, count, dtype, 1024)
    one = sparse_down_proj(values[0].contiguous(), indices, n, weights.down_t)
    agrees(one[None], values.double()[:1, :count] @ weights.down.double()[:, used].T, count, dtype, 1024)


@pytest.mark.parametrize("method", ["up", "cw", "chess", *PREDICTORS])
def test_nan_spreads(method):
    weights = Weights(512, 512, torch.float32)
    x = weights.x(1)
    x[0, 3] = math.nan
    assert weights.layer(method, "silu", 0.5)(x).isnan().all()


@pytest.mark.parametrize(("method", "deterministic"), ORDERS)
def test_graph_replays_with_changing_inputs_under_load(method, deterministic):
    weights = Weights(1024, 2048, torch.bfloat16)
    threshold = float(weights.scores(method, weights.x(1), "silu").quantile(0.8013))
    layer = weights.layer(method, "silu", threshold, deterministic=deterministic)
    x, out = weights.x(1), torch.empty(1, 1024, device="cuda", dtype=torch.bfloat16)
    inputs = torch.cat([weights.x(1, seed) for seed in range(50)])
    eager = torch.cat([layer(inputs[i : i + 1]) for i in range(50)])
    # one order of sums gives the same bits; two orders, twice the bound at most
    one_order = deterministic or method in PREDICTORS
    limits = (0 if one_order else 2 * bound(2048, torch.bfloat16, 1024)) * eager.abs().amax(1).double()
    graph, stream, busy = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        layer(x, out)
    load = torch.randn(2048, 2048, device="cuda")
    wrong = torch.zeros((), device="cuda")
    for i in range(3000):
        if i % 10 == 0:
            with torch.cuda.stream(busy):
                load @ load
        with torch.cuda.stream(stream):
            x.copy_(inputs[i % 50 : i % 50 + 1])
            out.fill_(math.nan)
            graph.replay()
            wrong += ~((out.double() - eager[i % 50].double()).abs().max() <= limits[i % 50])  # NaN is wrong
    torch.cuda.synchronize()
    assert wrong.item() == 0


@pytest.mark.parametrize("method", FIRST)
@pytest.mark.parametrize("n", [1, 2])
def test_claimed_rows_are_all_used_once_in_repeated_launches(method, n):
    """A launch of another batch or of other inputs in between has its own counters; each output is held against float64."""
    weights = Weights(4096, 14336, torch.bfloat16)
    layer = weights.layer(method, "silu", float(weights.scores(method, weights.x(1), "silu").quantile(0.9013)))
    assert layer.plan(n).claims
    for seed in range(20):
        check(weights, layer, method, "silu", weights.x(n, seed))
        check(weights, layer, method, "silu", weights.x(3 - n, seed))


def test_two_models_on_two_streams_do_not_disturb_each_other():
    models = [Weights(1024, 2048, torch.bfloat16, seed=s) for s in (1, 2)]
    layers = [w.layer(m, "silu", 0.9, deterministic=True) for w, m in zip(models, ("up", "predictor"), strict=True)]
    x = [w.x(1) for w in models]
    expected = [layer(v).clone() for layer, v in zip(layers, x, strict=True)]
    streams = [torch.cuda.Stream() for _ in models]
    torch.cuda.synchronize()
    outs = [[], []]
    for _ in range(500):
        for i in (0, 1):
            with torch.cuda.stream(streams[i]):
                outs[i].append(layers[i](x[i]))
    torch.cuda.synchronize()
    for i in (0, 1):
        assert all(torch.equal(o, expected[i]) for o in outs[i])


@pytest.mark.parametrize("first", ["up", "gate"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_of_one_change_no_bit(dtype, first):
    weights = Weights(1024, 2048, dtype)
    layers = []
    for scale in (None, torch.ones(2048, device="cuda")):
        options = {"activation": "silu", "first": first, "threshold": 0.5, "deterministic": True, "scale": scale}
        layers.append(ThresholdLayer(weights.gate, weights.up, weights.down_t, **options))
    for n in (1, 2, 4, 8):
        x = weights.x(n)
        assert torch.equal(layers[0](x), layers[1](x))
        assert all(torch.equal(layers[0].active(token), layers[1].active(token)) for token in range(n))


def test_keep_dense_false_needs_no_second_copy():
    down = torch.randn(512, 1024, device="cuda").to(torch.bfloat16)
    before = down.clone()
    copy = transpose_down(down, keep_dense=False)
    assert down.data_ptr() == copy.data_ptr()
    assert torch.equal(down, before)
