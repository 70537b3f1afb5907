"""Bad input of the CPU kernels: one ValueError that names the value, nothing computed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kernels_numba import cpu

GATE, UP, DOWN_T = (torch.randn(40, 24, generator=torch.Generator().manual_seed(n)) for n in range(3))
X = torch.ones(24)


def threshold_layer(gate=GATE, up=UP, down_t=DOWN_T, **options):
    options = {"activation": "silu", "first": "up", "threshold": 0.5} | options
    return cpu.ThresholdLayer(gate, up, down_t, **options)


def given(active, x=X, out=None):
    return cpu.GivenLayer(GATE, UP, DOWN_T, activation="silu")(x, active, out)


BAD = {
    "bf16 weights": (lambda: threshold_layer(gate=GATE.bfloat16()), "w_gate has dtype bfloat16"),
    "fp64 weights": (lambda: threshold_layer(up=UP.double().numpy()), "w_up has dtype float64"),
    "list": (lambda: threshold_layer(gate=[[1.0]]), "w_gate is a list"),
    "meta device": (lambda: threshold_layer(down_t=DOWN_T.to("meta")), "w_down_t is on meta"),
    "down not transposed": (lambda: threshold_layer(down_t=DOWN_T.t().contiguous()), r"w_down_t has shape \(24, 40\)"),
    "strided": (lambda: threshold_layer(up=UP.t().contiguous().t()), "w_up is not contiguous"),
    "empty": (lambda: threshold_layer(torch.empty(0, 24), torch.empty(0, 24), torch.empty(0, 24)), "at least 1"),
    "activation": (lambda: threshold_layer(activation="relu"), "unknown activation 'relu'; known: silu, gelu_tanh"),
    "first": (lambda: threshold_layer(first="down"), "first='down'"),
    "NaN threshold": (lambda: threshold_layer(threshold=math.nan), "threshold is NaN"),
    "no threads": (lambda: threshold_layer(threads=0), "threads=0"),
    "many threads": (lambda: threshold_layer(threads=10**6), "threads=1000000"),
    "x too short": (lambda: threshold_layer()(torch.ones(23)), r"x has shape \(23,\)"),
    "x a scalar": (lambda: threshold_layer()(torch.tensor(1.0)), r"x has shape \(\)"),
    "x fp16": (lambda: threshold_layer()(X.half()), "x has dtype float16"),
    "x strided": (lambda: threshold_layer()(torch.ones(48)[::2]), "x is not contiguous"),
    "out of another shape": (lambda: threshold_layer()(X, torch.empty(25)), r"out has shape \(25,\)"),
    "out of another dtype": (lambda: threshold_layer()(X, torch.empty(24).double()), "out has dtype float64"),
    "two tokens, one set": (lambda: given(torch.arange(3), torch.ones(2, 24)), "x holds 2 tokens"),
    "index too large": (lambda: given(torch.tensor([0, 40])), r"indices from 0 to 40: must be in \[0, 40\)"),
    "index negative": (lambda: given(torch.tensor([-1, 3])), "indices from -1 to 3"),
    "float indices": (lambda: given(torch.ones(3)), "active has dtype float32: convert it to int32 or int64"),
    "bool mask": (lambda: given(torch.ones(40, dtype=torch.bool)), "active has dtype bool"),
    "too many indices": (lambda: given(torch.zeros(41, dtype=torch.int32)), "active has 41 entries"),
    "count too large": (lambda: cpu.sparse_down_proj(torch.ones(3), torch.arange(3), 4, DOWN_T), "count=4"),
    "count negative": (lambda: cpu.sparse_down_proj(torch.ones(3), torch.arange(3), -1, DOWN_T), "count=-1"),
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
