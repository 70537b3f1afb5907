"""Bad input of the CUDA layers: one clear error before any launch."""

from __future__ import annotations

import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from kernels_numba.gpu.host.down_proj import sparse_down_proj
from kernels_numba.gpu.host.layers import GivenLayer, ThresholdLayer


def matrix(rows=64, columns=128, dtype=torch.bfloat16):
    return torch.randn(rows, columns, device="cuda").to(dtype)


def layer(**changes):
    given = {"w_gate": matrix(), "w_up": matrix(), "w_down_t": matrix(), "first": "up", "threshold": 0.5}
    return ThresholdLayer(**(given | {"activation": "silu"} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_gate": matrix(dtype=torch.float32)}, "other weights are"),
        ({"w_up": matrix(64, 120)}, "expected"),
        ({"w_up": matrix(128, 64).t()}, "contiguous"),
        ({"w_gate": matrix().cpu()}, "CUDA device"),
        ({"w_down_t": matrix().double()}, "dtype"),
        ({"w_down_t": matrix(64, 100)}, "multiple of 8"),
        ({"threshold": math.nan}, "NaN"),
        ({"scale": torch.ones(64)}, "scale is torch.float32 on cpu"),
        ({"scale": torch.ones(128, device="cuda")}, "scale has shape"),
        ({"first": "down"}, "first"),
        ({"activation": "relu"}, "activation"),
    ],
)
def test_weights(changes, message):
    with pytest.raises(ValueError, match=message):
        layer(**changes)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 128), "layer is"),
        (matrix(1, 120), "expected"),
        (matrix(9, 128), "1 to 8"),
        (matrix(128, 2).t(), "contiguous"),
    ],
)
def test_inputs(x, message):
    with pytest.raises(ValueError, match=message):
        layer()(x)


def test_index_out_of_range_is_found_when_checked():
    indices = torch.tensor([0, 64], dtype=torch.int32, device="cuda")
    count = torch.tensor([2], dtype=torch.int32, device="cuda")
    given = GivenLayer(matrix(), matrix(), matrix(), activation="silu", checked=True)
    with pytest.raises(ValueError, match="indices"):
        given(matrix(1, 128), indices, count)
    with pytest.raises(ValueError, match="count"):
        sparse_down_proj(matrix(1, 2)[0], indices, count + 1, matrix(), checked=True)
