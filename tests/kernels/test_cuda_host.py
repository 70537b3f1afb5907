"""Host side of the CUDA layers without a GPU: bad input, which launches a call makes, plans changed for measurements."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("llvmlite")

from kernels_numba.gpu.host import checks, down_proj, jit, layers
from kernels_numba.gpu.host import low_rank as host_low_rank
from kernels_numba.gpu.mlp.plan import Plan
from kernels_numba.gpu.mlp.trace import STAMPS
from kernels_numba.reference import LowRank


class FakeLaunch:
    """Keeps what it was set to, and every launch."""

    made: list = []

    def __init__(self, loaded, arguments):
        self.loaded, self._values, self.launched = loaded, dict(arguments), []
        FakeLaunch.made.append(self)

    def set(self, name, value):
        self._values[name] = value

    def values(self):
        return dict(self._values)

    def __call__(self, stream):
        self.launched.append((stream, self.values()))


@pytest.fixture(autouse=True)
def host(monkeypatch):
    """Tensors on the CPU pass as CUDA tensors; kernels are not compiled."""
    FakeLaunch.made = []
    real = checks.check_weight

    def on_cpu(name, value, shape, like):
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            value = SimpleTensor(value)
        real(name, value, shape, like)

    class SimpleTensor(torch.Tensor):
        """A CPU tensor that says it is on a CUDA device."""

        @staticmethod
        def __new__(cls, value):
            return torch.Tensor._make_subclass(cls, value)

        @property
        def device(self):
            return SimpleNamespace(type="cuda")

    monkeypatch.setattr(layers, "check_weight", lambda n, v, s, like: on_cpu(n, v, s, None))
    monkeypatch.setattr(host_low_rank, "check_weight", layers.check_weight)
    monkeypatch.setattr(layers, "unavailable", lambda device="cuda": "")
    monkeypatch.setattr(layers, "device_facts", lambda device: (132, (9, 0)))
    monkeypatch.setattr(layers, "load_kernel", lambda plan, device: SimpleNamespace(plan=plan.check(), jit_s=1.0))
    monkeypatch.setattr(layers, "Launch", FakeLaunch)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=7))


def matrix(rows=64, columns=128, dtype=torch.bfloat16):
    return torch.randn(rows, columns).to(dtype)


def low_rank(rank=20, **changes):
    return LowRank(**({"v": matrix(128, rank), "u": matrix(64, rank), "residual": torch.rand(64)} | changes))


def threshold(**changes):
    given = {"w_gate": matrix(), "w_up": matrix(), "w_down_t": matrix(), "first": "up", "threshold": 0.5}
    return layers.ThresholdLayer(**(given | {"activation": "silu"} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_up": matrix(64, 120)}, r"w_up has shape \(64, 120\): expected \(64, 128\)"),
        ({"w_up": matrix(128, 64).t()}, r"not contiguous \(strides \(1, 64\)\)"),
        ({"w_down_t": matrix().double()}, "w_down_t has dtype torch.float64: convert it to"),
        ({"w_down_t": matrix(64, 100)}, "d_model=100: the CUDA kernels need a positive multiple of 8; pad"),
        ({"w_down_t": matrix(60, 128)}, "d_ff=60: the CUDA kernels need a positive multiple of 8; pad"),
        ({"w_down_t": matrix()[0]}, "w_down_t must be a matrix"),
        ({"threshold": math.nan}, "threshold is NaN: fit it"),
        ({"threshold": "0.5"}, "threshold='0.5' is a str: pass a float"),
        ({"threshold": True}, "threshold=True is a bool"),
        ({"scale": torch.ones(63)}, r"scale has shape \(63,\): expected a contiguous vector of 64 entries"),
        ({"scale": torch.ones(128)[::2]}, "scale has shape .*: expected a contiguous vector"),
        ({"scale": torch.ones(64).double()}, "scale is torch.float64 on cpu: the kernel reads torch.float32"),
        ({"scale": 0.5}, "scale is a float: pass a torch tensor, or None"),
        ({"low_rank": low_rank(rank=0)}, r"v of low_rank must be a matrix \(d_model, rank\) with at least one column"),
        ({"low_rank": low_rank(rank=136)}, "rank=136 of low_rank: at most d_model=128"),
        ({"low_rank": low_rank(v=matrix(120, 20))}, r"v of low_rank has shape \(120, 20\): expected \(128, 20\)"),
        ({"low_rank": low_rank(u=matrix(64, 16))}, r"u of low_rank has shape \(64, 16\): expected \(64, 20\)"),
        ({"low_rank": low_rank(residual=torch.ones(64).half())}, "residual of low_rank is torch.float16 on cpu"),
        ({"low_rank": low_rank(), "scale": torch.ones(64)}, "scale and low_rank are both given: .* leave one out"),
        ({"first": "down"}, "first='down': must be 'up'"),
        ({"activation": "relu"}, "activation 'relu': the CUDA kernels know silu and gelu_tanh"),
        ({"w_gate": None}, "w_gate is a NoneType: pass a torch tensor"),
    ],
)
def test_bad_weights_are_refused_before_any_launch(changes, message):
    with pytest.raises(ValueError, match=message):
        threshold(**changes)
    assert not FakeLaunch.made


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (matrix(1, 128, torch.float32), "x is torch.float32 on cpu: the layer is torch.bfloat16"),
        (matrix(1, 120), r"x has shape \(1, 120\): expected \(..., 128\)"),
        (matrix(9, 128), "x holds 9 tokens: the kernels take 1 to 8; use the dense layer"),
        (matrix(128, 2).t(), "x is not contiguous"),
        (torch.tensor(1.0, dtype=torch.bfloat16), "x has shape"),
    ],
)
def test_bad_tokens_are_refused_before_any_launch(x, message):
    with pytest.raises(ValueError, match=message):
        threshold()(x)
    assert not FakeLaunch.made


def test_an_output_that_overlaps_what_is_read_is_refused():
    layer, x = threshold(), matrix(4, 128)
    with pytest.raises(ValueError, match="out overlaps x from another address on"):
        layer(x[:3], x[1:])
    with pytest.raises(ValueError, match="out overlaps residual"):
        layer(matrix(3, 128), x[1:], residual=x[:3])
    with pytest.raises(ValueError, match="out overlaps values"):
        down_proj.sparse_down_proj(x[:2], torch.arange(128).int(), torch.ones(1).int(), matrix(), x[1:3])
    assert not any(launch.launched for launch in FakeLaunch.made)
    assert layer(x, x, residual=x) is x


def test_threshold_set_later_is_checked_and_reaches_launches_made_before():
    layer = threshold()
    layer(matrix(1, 128))
    layer.threshold = 0.25
    layer(matrix(1, 128))
    assert [values["threshold"] for _, values in FakeLaunch.made[0].launched] == [0.5, 0.25]
    with pytest.raises(ValueError, match="NaN"):
        layer.threshold = math.nan


def test_a_factor_compiles_another_kernel_and_reaches_its_launches():
    scale, plain = torch.rand(64), threshold()
    layer = threshold(scale=scale)
    for one in (plain, layer):
        one(matrix(1, 128))
    assert [launch.loaded.plan.scaled for launch in FakeLaunch.made] == [False, True]
    assert [launch.launched[0][1].get("values", 0) for launch in FakeLaunch.made] == [0, scale.data_ptr()]
    assert layer.extra_bytes - plain.extra_bytes == 4 * 64
    with pytest.raises(ValueError, match="scaled of kind given"):
        Plan("given", 128, 64, scaled=True).check()


def test_a_low_rank_is_laid_out_for_its_kernel_and_counted():
    low, plain = low_rank(), threshold()
    layer = threshold(low_rank=low)
    layer(matrix(1, 128))
    plan, values = FakeLaunch.made[0].loaded.plan, FakeLaunch.made[0].launched[0][1]
    assert (plan.rank, plan.launch_threads) == (
        20,
        32 + 32 + 32,
    )  # those on rows, the warp that claims, that of factors
    assert values["values"] == low.residual.data_ptr()
    held = layer._low_rank
    assert (values["b"], values["u"]) == (held.v.data_ptr(), held.u.data_ptr())
    assert torch.equal(held.v, low.v.t())
    assert torch.equal(held.u, torch.nn.functional.pad(low.u, (0, 4)))  # whole multiples of 16 bytes
    layer._launches.clear()
    assert layer.extra_bytes - plain.extra_bytes == 2 * (20 * 128 + 24 * 64) + 4 * 64


def test_rows_of_u_are_fetched_ahead_before_the_ring_is_deep():
    plans = [
        layers.tuned_plan("threshold", 4096, 14336, "bfloat16", "silu", rank=r, n_blocks=132, capability=(9, 0))
        for r in (128, 512)
    ]
    assert [(plan.depth, plan.ahead, plan.resident) for plan in plans] == [(3, 4, 2), (2, 4, 2)]


def test_a_call_with_many_tokens_is_split_where_registers_end():
    wide = threshold(w_gate=matrix(64, 5120), w_up=matrix(64, 5120), w_down_t=matrix(64, 5120))
    assert wide.launch_tokens == 4
    x = matrix(7, 5120)
    y = wide(x)
    tokens = [(launch.loaded.plan.batch, values) for launch in FakeLaunch.made for _, values in launch.launched]
    assert [(batch, values["n_tokens"]) for batch, values in tokens] == [(4, 4), (4, 3)]
    assert tokens[1][1]["x"] - x.data_ptr() == tokens[1][1]["y"] - y.data_ptr() == 4 * 5120 * 2


def test_deterministic_layers_and_larger_batches_claim_nothing():
    plans = [threshold(deterministic=deterministic).plan(n) for deterministic in (False, True) for n in (1, 2, 4)]
    assert [plan.claims for plan in plans] == [True, True, False, False, False, False]
    assert {plan.launch_threads - plan.threads for plan in plans} == {0, 32}


def test_bound_launches_repeat_the_call_on_the_same_tensors():
    layer, x, out = threshold(), matrix(1, 128), matrix(1, 128)
    again = layer.bind(x, out)
    again()
    bound = FakeLaunch.made[-1]
    assert [stream for stream, _ in bound.launched] == [7]
    assert (bound.values()["x"], bound.values()["y"]) == (x.data_ptr(), out.data_ptr())


def test_a_changed_plan_is_what_is_launched_and_its_phases_can_be_read():
    layer = threshold()
    with pytest.raises(ValueError, match="trace is off"):
        layer.phases()
    assert layer.plan(3).batch == 4
    layer.change_plan(trace=True, overlap=False)
    layer(matrix(1, 128))
    plan, workspace = layer.last_launch
    assert (plan.trace, plan.overlap) == (True, False)
    at = plan.workspace.trace
    stamps = workspace[at : at + plan.n_blocks * len(STAMPS) * 8].view(torch.int64).view(plan.n_blocks, len(STAMPS))
    stamps.copy_(torch.arange(len(STAMPS)).square().expand_as(stamps))
    assert [int(cycles[0]) for cycles in layer.phases().values()] == [1, 15, 9, 11]


def test_lists_are_checked():
    given = layers.GivenLayer(matrix(), matrix(), matrix(), activation="silu", checked=True)
    indices, count = torch.tensor([0, 64], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    x = matrix(1, 128)
    with pytest.raises(ValueError, match=r"indices run from 0 to 64: must be in \[0, 64\)"):
        given(x, indices, count)
    with pytest.raises(ValueError, match="indices hold 9 more than once"):
        given(x, torch.tensor([9, 63, 9], dtype=torch.int32), count + 1)
    with pytest.raises(ValueError, match="indices must be an int32 tensor"):
        given(x, indices.long(), count)
    with pytest.raises(ValueError, match="count has shape"):
        given(x, indices, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="count=3: must be 0 to 2"):
        down_proj.sparse_down_proj(matrix(1, 2)[0], indices, count + 1, matrix(), checked=True)
    with pytest.raises(ValueError, match="values must be contiguous"):
        down_proj.sparse_down_proj(torch.zeros(2), indices, count, matrix())
    with pytest.raises(ValueError, match="values have shape"):
        down_proj.sparse_down_proj(matrix(1, 3)[0], indices, count, matrix())
    with pytest.raises(ValueError, match="out has shape"):
        down_proj.sparse_down_proj(matrix(1, 2)[0], indices, count, matrix(), matrix(1, 120)[0])
    assert not any(launch.launched for launch in FakeLaunch.made)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan("threshold", 4096, 1 << 24), "d_ff=16777216: the kernels pack a neuron into 24 bits; split the layer"),
        (
            Plan("predictor", 4096, 1 << 23, rank=64),
            "bytes of shared memory: over the",
        ),  # the list of a block's own rows
        (Plan("threshold", 4096, 14336, depth=16), "depth=16: at most 14 and 15"),
        (Plan("threshold", 4096, 14336, capability=(7, 5)), r"compute capability 7.5: the kernels need 8.0"),
        (Plan("threshold", 4096, 14336, dtype="float64"), "dtype float64"),
        (Plan("threshold", 4096, 14336, batch=3), "batch=3: a launch holds 1, 2, 4 or 8 tokens"),
        (Plan("predictor", 4096, 14336), "rank=0 of kind predictor"),
        (Plan("predictor", 4096, 14336, rank=16384), "rank=16384: a row of the predictor must fit"),
    ],
)
def test_plans_that_cannot_be_compiled(plan, message):
    with pytest.raises(ValueError, match=message):
        plan.check()


@pytest.mark.parametrize(
    ("there", "capability", "broken", "message"),
    [
        (False, (9, 0), "", "no CUDA device"),
        (True, (7, 5), "", "compute capability 7.5: the kernels need 8.0"),
        (
            True,
            (9, 0),
            "row_stack",
            "numba-cuda cannot be imported .*row_stack.*: install numba-cuda.* and numpy < 2.5",
        ),
        (True, (9, 0), "", ""),
    ],
)
def test_reasons_why_the_kernels_cannot_run(monkeypatch, there, capability, broken, message):
    import builtins

    real = builtins.__import__

    def importing(name, *rest):
        if broken and name == "numba.cuda":  # what numba-cuda 0.30 does under numpy 2.5
            raise AttributeError(f"module 'numpy' has no attribute '{broken}'")
        return real(name, *rest)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(builtins, "__import__", importing)
    assert (checks.unavailable() == "") == (message == "")
    import re

    assert re.match(message, checks.unavailable())


def test_the_key_of_ptx_has_every_module_by_its_full_name(monkeypatch):
    root = Path(jit.__file__).parents[2]
    gpu = root / "gpu"
    assert {gpu / "mlp" / "kernel.py", gpu / "ptx" / "device.py", gpu / "ptx" / "warp.py"} <= set(jit.sources())
    monkeypatch.setattr(jit, "_ENTRIES", ("kernels_numba.cpu", "kernels_numba.gpu.host.down_proj", "kernels_numba.gpu"))
    found = set(jit.sources())
    assert {root / "checks.py", gpu / "host" / "checks.py", root / "cpu.py", gpu / "__init__.py"} <= found
    assert all(path.is_file() for path in found)
