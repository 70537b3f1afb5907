"""A GPU played by the CPU: what the rigs of CUDA do around the kernels can be tested where there is none."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

from suite.devices import Device
from suite.speed import bench, clock

CPU_GENERATOR = torch.Generator


class _OnCpu(TorchFunctionMode):
    """Tensors that are asked for on ``cuda`` are made on the CPU."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = "cpu"
        return function(*arguments, **options)


class Kernel:
    """A layer's kernel in torch: keeps the neurons whose score reaches the threshold, or those of a list."""

    launch_tokens = 8
    extra_bytes = 1 << 20

    def __init__(self, *weights, activation="silu", threshold=None, first="", scale=None, low_rank=None):
        self.w_gate, self.w_up, self.w_down_t, *self.predictor = weights
        self.activation, self.threshold, self.first, self.scale = activation, threshold, first, scale
        self.changes, self.kept, self.low_rank = {}, None, low_rank

    def change_plan(self, **changes):
        self.changes = changes

    def plan(self, batch):
        return self, batch

    def prepare(self, batch):
        return SimpleNamespace(jit_s=0.25)

    def phases(self):
        assert self.changes == {"trace": True}
        return {"fill": torch.arange(5), "rest": torch.arange(5) + 1000}

    def active(self, token=0):
        return self.kept[token].nonzero()[:, 0]

    def __call__(self, x, *listed, out=None):
        *listed, out = (*listed, out) if out is not None else listed
        wide = x.double()
        gate, up = wide @ self.w_gate.double().T, wide @ self.w_up.double().T
        act = torch.nn.functional.silu(gate)
        if listed:
            self.kept = torch.zeros_like(up, dtype=torch.bool)
            self.kept[:, listed[0][: int(listed[1])].long()] = True
        else:
            score = (up if self.first == "up" else act).abs()
            if self.scale is not None:
                score = score * self.scale
            if self.low_rank is not None:
                guess = wide @ self.low_rank.v.double() @ self.low_rank.u.double().T
                guess = torch.nn.functional.silu(guess) if self.first == "up" else guess
                score = score * (guess.square() + self.low_rank.residual).sqrt()
            if self.predictor:
                v, u = self.predictor
                score = wide @ v.double().T @ u.double().T
            self.kept = score >= self.threshold
        return out.copy_((act * up * self.kept) @ self.w_down_t.double())

    def bind(self, *arguments):
        self(*arguments)
        return lambda: self(*arguments)


class Projection(Kernel):
    """The down projection alone."""

    def __init__(self, w_down_t):
        self.w_down_t, self.changes = w_down_t, {}

    def __call__(self, values, listed, count, out):
        return out.copy_(values.double() @ self.w_down_t[listed[: int(count)].long()].double())


class Event:
    """Of the wall clock."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = clock.time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def play_gpu(monkeypatch):
    """Patch torch's CUDA functions, the device, and the read bandwidth; returns the mode to run within."""
    for name, value in {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "Event": Event,
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: None,
        "stream": _Within,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 3 << 20,
        "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=1 << 14),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": CPU_GENERATOR())
    monkeypatch.setattr(bench, "_no_device", lambda device: "")
    monkeypatch.setattr(bench.devices, "gpu", lambda: Device("cuda", "a GPU", "1.2"))
    return _OnCpu()


class _Within:
    def __init__(self, stream):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def captured(run, warm_up=3):
    """A graph that runs the call again."""
    for _ in range(warm_up):
        run()
    return SimpleNamespace(replay=run)


def small_bandwidth():
    """Of a buffer that takes no time."""
    buffer = torch.ones(1 << 16)
    return clock.ReadBandwidth([buffer.sum], 4 << 16, clock.event_times)
