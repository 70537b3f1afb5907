"""Gated predictors on the host side of the CUDA layers: the definition, what a launch is given, and bad input."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("llvmlite")

from kernels_numba.gpu.host import gated as host_gated
from kernels_numba.gpu.host import layers
from kernels_numba.gpu.mlp.plan import Plan
from kernels_numba.reference import Gated, LowRank
from suite.modeling.decode_layers import chooses_on_cuda, cuda_predicting, gated_parts
from suite.modeling.gated_mlp import find_gated_mlps
from tests.conftest import D_FF, D_MODEL, predictor_fit, tiny_model
from tests.kernels.test_cuda_host import FakeLaunch, host, matrix  # noqa: F401  the fixture of both


@pytest.fixture(autouse=True)
def stand_in(host, monkeypatch):  # noqa: F811
    """Tensors on the CPU pass as CUDA tensors."""
    monkeypatch.setattr(host_gated, "check_weight", layers.check_weight)


def low_rank(rank, d_model=128, d_ff=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rank)
    v, u = (torch.randn(n, rank, generator=generator).to(dtype) for n in (d_model, d_ff))
    return LowRank(v, u, torch.rand(d_ff, generator=generator))


def gated(**changes):
    return replace(Gated(low_rank(40), low_rank(24)), **changes)


def layer(given, **options):
    weights = [matrix(dtype=torch.float32) for _ in range(3)]
    return host_gated.GatedPredictorLayer(*weights, given, **{"activation": "silu", "threshold": 0.5} | options)


def at(address, *shape):
    """The fp32 array that a launch finds at an address."""
    buffer = (ctypes.c_float * int(np.prod(shape))).from_address(address)
    return torch.from_numpy(np.frombuffer(buffer, np.float32).reshape(shape).copy())


@pytest.mark.parametrize("method", ["d-countdown", "s-countdown", "dejavu-abs"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_logits_are_those_of_the_fit(method, activation):
    fit = replace(predictor_fit(method, kind="gated"), activation=activation)
    x = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(1))
    for number in range(2):
        own = gated_parts(fit, number, torch.float32).logits(x, activation)
        assert own.shape == (3, D_FF)
        torch.testing.assert_close(own, fit.logits(number, x), rtol=1e-5, atol=1e-6)
        wide = gated_parts(fit, number, torch.float32).logits(x.double(), activation)
        torch.testing.assert_close(own.double(), wide, rtol=1e-5, atol=1e-6)


def test_one_kernel_stands_in_for_each_projection_once():
    known = {"low-rank": True, "gated": True, "ternary": False}
    assert {kind: chooses_on_cuda(predictor_fit(kind=kind)) for kind in known} == known
    assert not chooses_on_cuda(predictor_fit(kind="gated", predicted=("gate", "act")))


def test_layers_of_a_model_are_bound_to_its_fit():
    mlps, fit = find_gated_mlps(tiny_model("gemma2")), predictor_fit("s-countdown", kind="gated", rank=8)
    made = cuda_predicting(mlps, [0.25, 0.75], fit)
    for number, one in enumerate(made):
        one(torch.randn(2, D_MODEL))
        launch = FakeLaunch.made[-1]
        values, parts = launch.launched[0][1], gated_parts(fit, number, torch.float32)
        assert (launch.loaded.plan.activation, values["threshold"]) == ("gelu_tanh", (0.25, 0.75)[number])
        assert torch.equal(at(values["dense"], 16, D_MODEL), fit.v[number].T)
        assert torch.equal(at(values["u"], D_FF, 256)[:, 128:136], parts.up.u)
        assert torch.equal(at(values["values"], 2, D_FF), fit.residual[number])


@pytest.mark.parametrize("act", [True, False])
def test_a_launch_finds_the_parts_side_by_side_with_zeros_between(act):
    given = gated(act=act)
    one = layer(given)
    one(matrix(1, 128, torch.float32))
    plan, values = FakeLaunch.made[-1].loaded.plan, FakeLaunch.made[-1].launched[0][1]
    assert (plan.kind, plan.rank, plan.rank_padded) == ("predictor", 64, 256)
    assert plan.predicted == (("act" if act else "gate", 40), ("up", 24))
    assert torch.equal(at(values["dense"], 64, 128), torch.cat([given.gate.v, given.up.v], 1).T)
    u = at(values["u"], 64, 256)
    assert torch.equal(u[:, :40], given.gate.u)
    assert torch.equal(u[:, 128:152], given.up.u)
    assert u.count_nonzero() == 64 * (40 + 24)
    assert torch.equal(at(values["values"], 2, 64), torch.stack([given.gate.residual, given.up.residual]))
    assert one.extra_bytes == 4 * (64 * 128 + 64 * 128 + 64 * 256 + 2 * 64) + one.workspace_bytes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (gated(gate=None, up=None), "gated has neither gate nor up: give it at least one"),
        (gated(up=low_rank(24, d_ff=56)), r"u of up has shape \(56, 24\): expected \(64, 24\)"),
        (gated(up=low_rank(24, d_model=120)), r"v of up has shape \(120, 24\): expected \(128, 24\)"),
        (gated(gate=low_rank(0)), r"v of act must be a matrix \(d_model, rank\) with at least one column"),
        (gated(gate=replace(low_rank(8), v=torch.ones(128))), "v of act must be a matrix"),
        (gated(gate=replace(low_rank(8), residual=torch.ones(63))), r"residual of act has shape \(63,\): expected"),
        (gated(gate=replace(low_rank(8), residual=torch.ones(64).double())), "residual of act is torch.float64"),
    ],
)
def test_bad_parts_are_refused_before_any_launch(given, message):
    with pytest.raises(ValueError, match=message):
        layer(given)
    assert not FakeLaunch.made


@pytest.mark.parametrize("predicted", [(("act", 23),), (("act", 8), ("gate", 8), ("up", 8))])
def test_quantities_that_no_kernel_takes_are_refused(predicted):
    with pytest.raises(ValueError, match="one or two quantities, whose ranks add up to rank=24"):
        Plan("predictor", 64, 64, rank=24, predicted=predicted).check()
