"""Bad input of the CPU kernels: one ValueError that names the value, nothing computed."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from kernels_numba import cpu
from kernels_numba.reference import LowRank
from suite.errors import InputError
from suite.modeling.attach import attach
from suite.registry import get_method
from tests.conftest import decode_state, tiny_model

GATE, UP, DOWN_T = (torch.randn(40, 24, generator=torch.Generator().manual_seed(n)) for n in range(3))
X = torch.ones(24)
TOKENS = torch.randn(4, 24, generator=torch.Generator().manual_seed(3))
READ_ONLY = np.zeros(24, dtype=np.float32)
READ_ONLY.flags.writeable = False


def threshold_layer(gate=GATE, up=UP, down_t=DOWN_T, **options):
    options = {"activation": "silu", "first": "up", "threshold": 0.5} | options
    return cpu.ThresholdLayer(gate, up, down_t, **options)


def given(active, x=X, out=None):
    return cpu.GivenLayer(GATE, UP, DOWN_T, activation="silu")(x, active, out)


def low_rank(rank=2, **parts):
    return LowRank(**{"v": torch.ones(24, rank), "u": torch.ones(40, rank), "residual": torch.ones(40)} | parts)


BAD = {
    "bf16 weights": (lambda: threshold_layer(gate=GATE.bfloat16()), "w_gate has dtype bfloat16"),
    "fp64 weights": (lambda: threshold_layer(up=UP.double().numpy()), "w_up has dtype float64"),
    "list": (lambda: threshold_layer(gate=[[1.0]]), "w_gate is a list"),
    "meta device": (lambda: threshold_layer(down_t=DOWN_T.to("meta")), "w_down_t is on meta"),
    "down not transposed": (lambda: threshold_layer(down_t=DOWN_T.t().contiguous()), r"w_down_t has shape \(24, 40\)"),
    "column-major": (
        lambda: threshold_layer(up=UP.t().contiguous().t()),
        "w_up is column-major, not contiguous: call co",
    ),
    "strided": (lambda: threshold_layer(up=UP.repeat(1, 2)[:, ::2]), r"w_up is strided \(192, 8\), not contiguous"),
    "byte order": (lambda: threshold_layer(up=UP.numpy().astype(">f4")), "w_up has dtype >f4: convert it to float32"),
    "empty": (lambda: threshold_layer(torch.empty(0, 24), torch.empty(0, 24), torch.empty(0, 24)), "at least 1"),
    "activation": (lambda: threshold_layer(activation="relu"), "unknown activation 'relu'; known: silu, gelu_tanh"),
    "first": (lambda: threshold_layer(first="down"), "first='down'"),
    "NaN threshold": (lambda: threshold_layer(threshold=math.nan), "threshold is NaN"),
    "text threshold": (lambda: threshold_layer(threshold="0.5"), "threshold='0.5' is a str: pass a float"),
    "bool threshold": (lambda: threshold_layer(threshold=True), "threshold=True is a bool"),
    "no threshold": (lambda: threshold_layer(threshold=None), "threshold=None is a NoneType"),
    "huge threshold": (lambda: threshold_layer(threshold=10**400), "threshold is an integer too large"),
    "short scale": (lambda: threshold_layer(scale=torch.ones(39)), r"scale has shape \(39,\): expected \(40\)"),
    "fp64 scale": (lambda: threshold_layer(scale=np.ones(40)), "scale has dtype float64: convert it to float32"),
    "number as scale": (lambda: threshold_layer(scale=0.5), "scale is a float: pass a torch tensor"),
    "both factors": (
        lambda: threshold_layer(scale=torch.ones(40), low_rank=low_rank()),
        "scale and low_rank were given",
    ),
    "rank above d_model": (lambda: threshold_layer(low_rank=low_rank(rank=25)), "rank 25: must be 1 to d_model=24"),
    "no rank": (lambda: threshold_layer(low_rank=low_rank(rank=0)), "rank 0: must be 1 to d_model=24"),
    "other u": (lambda: threshold_layer(low_rank=low_rank(u=torch.ones(40, 3))), r"u of low_rank has shape \(40, 3\)"),
    "bf16 v": (
        lambda: threshold_layer(low_rank=low_rank(v=torch.ones(24, 2).bfloat16())),
        "v of low_rank has dtype bf",
    ),
    "short residual": (
        lambda: threshold_layer(low_rank=low_rank(residual=torch.ones(1))),
        "residual of low_rank has sha",
    ),
    "short seen": (lambda: threshold_layer(low_rank=low_rank())(X, seen=torch.ones(23)), r"seen has shape \(23,\)"),
    "bool threads": (lambda: threshold_layer(threads=True), "threads=True"),
    "no threads": (lambda: threshold_layer(threads=0), "threads=0"),
    "many threads": (lambda: threshold_layer(threads=10**6), "threads=1000000"),
    "x too short": (lambda: threshold_layer()(torch.ones(23)), r"x has shape \(23,\)"),
    "x a scalar": (lambda: threshold_layer()(torch.tensor(1.0)), r"x has shape \(\)"),
    "x fp16": (lambda: threshold_layer()(X.half()), "x has dtype float16"),
    "x strided": (lambda: threshold_layer()(torch.ones(48)[::2]), r"x is strided \(8,\), not contiguous"),
    "out a token late": (
        lambda: threshold_layer()(TOKENS[:3], TOKENS[1:]),
        "out overlaps the input from another address on",
    ),
    "out a token early": (
        lambda: threshold_layer()(TOKENS[1:], TOKENS[:3]),
        "out overlaps the input from another address on",
    ),
    "out half in x": (
        lambda: given(torch.arange(3), TOKENS.view(-1)[:24], TOKENS.view(-1)[12:36]),
        "out overlaps the input",
    ),
    "out in a weight": (lambda: given(torch.arange(3), out=UP[3]), "out overlaps w_up: it would overwrite the weights"),
    "op out in the weight": (
        lambda: cpu.sparse_down_proj(X, torch.arange(3), 3, DOWN_T, DOWN_T[0]),
        "overlaps w_down_t",
    ),
    "out read-only": (lambda: threshold_layer()(X, READ_ONLY), "out is read-only"),
    "out of another shape": (lambda: threshold_layer()(X, torch.empty(25)), r"out has shape \(25,\)"),
    "out of another dtype": (lambda: threshold_layer()(X, torch.empty(24).double()), "out has dtype float64"),
    "two tokens, one set": (lambda: given(torch.arange(3), torch.ones(2, 24)), "x holds 2 tokens"),
    "index too large": (lambda: given(torch.tensor([0, 40])), r"indices from 0 to 40: must be in \[0, 40\)"),
    "index negative": (lambda: given(torch.tensor([-1, 3])), "indices from -1 to 3"),
    "index twice": (lambda: given(torch.tensor([7, 3, 7])), "active holds 7 more than once"),
    "index twice in a row": (lambda: given(torch.tensor([3, 7, 7])), "active holds 7 more than once"),
    "op index twice": (
        lambda: cpu.sparse_down_proj(X, torch.tensor([5, 5]), 2, DOWN_T),
        "indices holds 5 more than once",
    ),
    "op index negative": (
        lambda: cpu.sparse_down_proj(X, torch.tensor([-1]), 1, DOWN_T),
        "indices has indices from -1",
    ),
    "float indices": (lambda: given(torch.ones(3)), "active has dtype float32: convert it to int32 or int64"),
    "bool mask": (lambda: given(torch.ones(40, dtype=torch.bool)), "active has dtype bool"),
    "too many indices": (lambda: given(torch.zeros(41, dtype=torch.int32)), "active has 41 entries"),
    "count too large": (lambda: cpu.sparse_down_proj(torch.ones(3), torch.arange(3), 4, DOWN_T), "count=4"),
    "count negative": (lambda: cpu.sparse_down_proj(torch.ones(3), torch.arange(3), -1, DOWN_T), "count=-1"),
    "count not whole": (lambda: cpu.sparse_down_proj(X, torch.arange(3), 2.0, DOWN_T), "count=2.0"),
    "count text": (lambda: cpu.sparse_down_proj(X, torch.arange(3), "2", DOWN_T), "count='2'"),
    "op index": (lambda: cpu.sparse_down_proj(torch.ones(1), torch.tensor([40]), 1, DOWN_T), "indices from 40"),
    "transpose of a vector": (lambda: cpu.transpose_down(X), r"w_down has shape \(24,\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_infinite_thresholds_are_right():
    assert threshold_layer(threshold=-math.inf).threshold == -math.inf
    layer = threshold_layer(threshold=math.inf)
    assert np.array_equal(layer(X.numpy()), np.zeros(24, dtype=np.float32))
    assert layer.count == 0


def test_output_in_place_is_right():
    layer, x = threshold_layer(), TOKENS.clone()
    wanted = layer(TOKENS)
    assert layer(x, x) is x
    assert torch.equal(x, wanted)


def test_weights_of_any_layout_are_transposed():
    down = DOWN_T.t()  # column-major (24, 40), as the CUDA layers leave it with keep_dense=False
    assert not down.is_contiguous()
    assert torch.equal(cpu.transpose_down(down), DOWN_T)


def test_column_major_models_are_refused_by_name_or_left_to_the_masked_backend():
    model = copy.deepcopy(tiny_model("llama"))  # the other tests' too
    up = model.model.layers[1].mlp.up_proj
    up.weight.data = up.weight.data.t().contiguous().t()
    method, state = get_method("m-countdown", sparsity=0.5), decode_state("m-countdown", "")
    with pytest.raises(InputError, match=r"gate or up of model\.layers\.1\.mlp is not contiguous: call contiguous"):
        attach(model, method, state, backend="numba").__enter__()
    with attach(model, method, state, backend="auto"):
        model(torch.ones(1, 1, dtype=torch.int64))
