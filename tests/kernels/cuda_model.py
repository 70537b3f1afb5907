"""Decodes tiny models with the CUDA kernels on Numba's simulator and compares with the masked backend; see cuda_cases.

NUMBA_ENABLE_CUDASIM=1 python -m tests.kernels.cuda_model ARCHITECTURE:METHOD:ROWS...     prints "... ok" or the error
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import torch
from numba import cuda

from kernels_numba.gpu.host.active_set import active_neurons
from kernels_numba.gpu.mlp.kernel import ARGUMENTS, make_kernel
from kernels_numba.gpu.mlp.plan import Plan
from kernels_numba.gpu.ptx import simulated, simulator
from suite.modeling import attach as attaching
from suite.modeling.attach import attach
from suite.modeling.decode import ChoosingKernels
from suite.modeling.gated_mlp import find_gated_mlps
from suite.registry import get_method
from tests.conftest import END, PAD, decode_state, tiny_model


class SimulatedLayer:
    """Stands in for ThresholdLayer and PredictorLayer: the kernel itself, run on the simulator."""

    launch_tokens = 2

    def __init__(self, mlp, first, threshold, predictor, scale, deterministic):
        gate, up, down = (weight.detach() for weight in mlp.weights())
        v = u = None
        if predictor is not None:
            v, u = predictor.v[mlp.layer].T.contiguous(), predictor.u[mlp.layer]
        rank = 0 if v is None else len(v)
        self._plan = Plan(
            "predictor" if rank else "threshold", mlp.d_model, mlp.d_ff, dtype="float32", activation=mlp.activation,
            first=first or "up", rank=rank, n_blocks=1, rows=2, neurons=1 if rank else 2, depth=2,
            deterministic=deterministic, scaled=scale is not None,
        )  # fmt: skip
        dense, other = (gate, up) if first == "gate" else (up, gate)
        tensors = {"dense": dense, "a": other, "down": down.T.contiguous()}
        if scale is not None:
            tensors |= {"values": scale}
        if v is not None:
            u = torch.nn.functional.pad(u, (0, self._plan.rank_padded - rank))
            tensors |= {"dense": v, "u": u, "a": gate, "b": up}
        self._arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()}
        self._threshold = np.float32(threshold)

    def __call__(self, x):
        n_tokens = x.numel() // x.shape[-1]
        plan = replace(self._plan, batch=n_tokens)
        workspace = np.zeros(plan.workspace.total, np.uint8)
        out = np.full((n_tokens, x.shape[-1]), np.nan, np.float32)
        source = np.ascontiguousarray(x.detach().reshape(n_tokens, -1).numpy())
        buffers = self._arrays | {"x": source, "y": out, "workspace": workspace}
        arguments = [buffers[name].ctypes.data if name in buffers else 0 for name in ARGUMENTS[:12]]
        with simulator.allowed(*buffers.values(), shared_bytes=plan.shared.total):
            kernel = cuda.jit(make_kernel(plan, simulated))
            kernel[1, plan.launch_threads, 0, 0](*arguments, plan.d_ff, self._threshold, n_tokens)
        self.last_launch = plan, torch.from_numpy(workspace)
        return torch.from_numpy(out).view(x.shape)

    def active(self):
        return active_neurons(*self.last_launch, 0)


def simulated_kernels(model, method, thresholds, predictor, *, calibrated, deterministic):
    mlps, first = find_gated_mlps(model), method.first_projection
    scales = [method.neuron_scale(layer) for layer in calibrated] if calibrated else [None] * len(mlps)
    each = zip(mlps, thresholds.tolist(), scales, strict=True)
    return ChoosingKernels(
        [SimulatedLayer(mlp, first, value, predictor, scale, deterministic) for mlp, value, scale in each]
    )


def compare(architecture: str, name: str, rows: int) -> str:
    """Empty if generation with the kernels equals masked generation: tokens, logits and what was counted."""
    model, method = tiny_model(architecture), get_method(name, sparsity=0.5)
    state = decode_state(name)
    prompt = torch.randint(3, 64, (rows, 4), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(prompt)
    if rows > 1:
        mask[0, :2], prompt[0, :2] = 0, PAD
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [PAD, END], "output_logits": True}
    found = {}
    for backend in ("masked", "numba"):
        with attach(model, method, state, scope="paper", backend=backend) as attached, torch.inference_mode():
            out = model.generate(prompt, attention_mask=mask, return_dict_in_generate=True, **options)
            found[backend] = out.sequences, torch.stack(out.logits), attached.sparsity()
    masked, numba = found["masked"], found["numba"]
    if not torch.equal(masked[0], numba[0]):
        return "other tokens"
    if masked[2] != numba[2] or not 0.05 < masked[2][0].sparsity_realized < 0.95:
        return f"counts {numba[2]}, masked {masked[2]}"
    if torch.equal(masked[1], numba[1]):
        return "the kernels did not run"
    error = float((masked[1] - numba[1]).abs().max())
    return "" if error < 1e-4 * float(masked[1].abs().max()) else f"error {error:.3g}"


def main(names: list[str]) -> None:
    """Compare ARCHITECTURE:METHOD:ROWS."""
    attaching.decode_kernels = simulated_kernels  # the one seam: no CUDA tensor here
    for name in names:
        architecture, _, rest = name.partition(":")
        method, _, rows = rest.rpartition(":")
        sys.stdout.write(f"{name} {compare(architecture, method, int(rows)) or 'ok'}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
