"""The kernels around the MLP on Numba's simulator against float64; run as a program with NUMBA_ENABLE_CUDASIM=1.

NUMBA_ENABLE_CUDASIM=1 python -m tests.kernels.step_cases CASE...        prints "CASE ok" or "CASE error ..."
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
from numba import cuda

from kernels_numba.gpu.decode import add_rms_norm, attention
from kernels_numba.gpu.decode.add_rms_norm import NormPlan
from kernels_numba.gpu.decode.attention import AttentionPlan
from kernels_numba.gpu.ptx import simulated_vectors, simulator
from kernels_numba.reference import relative_error
from tests.kernels.cuda_cases import LIMIT, stored

HEADS = {"n_kv": 2, "group": 2, "head_dim": 16, "rotary_dim": 16, "length": 512, "dtype": "float32", "scale": 0.3}
ATTENTION = {
    "heads": AttentionPlan(**HEADS),
    "splits": AttentionPlan(**HEADS, queries=2, split=256),
    "capped": AttentionPlan(**HEADS | {"group": 1, "head_dim": 32, "rotary_dim": 8}, cap=2.0),
    "window": AttentionPlan(**HEADS | {"n_kv": 1}, window=40, split=256),
    "bf16": AttentionPlan(**HEADS | {"dtype": "bfloat16", "head_dim": 32, "n_kv": 1}),
}
NORM = {
    "norm": NormPlan(40, "float32", 0.0, 1e-5, inner=False),
    "norm-inner": NormPlan(264, "float32", 1.0, 1e-6, inner=True),
    "norm-fp16": NormPlan(40, "float16", 1.0, 1e-5, inner=True),
}


def turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotary embedding of heads (n, head_dim)."""
    half = len(cos) // 2
    turning, rest = x[:, : 2 * half], x[:, 2 * half :]
    other = np.concatenate([-turning[:, half:], turning[:, :half]], 1)
    return np.concatenate([turning * cos + other * sin, rest], 1)


def attention_error(plan: AttentionPlan, position: int) -> float:
    """Relative error of the output; infinite if the cache was not written as it should, or a second launch differs."""
    rng = np.random.default_rng(position)
    n_heads, size = plan.n_kv * (plan.group + 2), plan.head_dim
    qkv, x = stored(rng.standard_normal((n_heads, size)), plan.dtype)
    kv, old = stored(rng.standard_normal((2, plan.n_kv, plan.length, size)), plan.dtype)
    angles = rng.standard_normal((plan.length, plan.rotary_dim // 2))
    angles = np.concatenate([angles, angles], 1)
    (cos, c), (sin, s) = stored(np.cos(angles), plan.dtype), stored(np.sin(angles), plan.dtype)
    q = turned(x[: plan.n_kv * plan.group], c[position], s[position]).reshape(plan.n_kv, plan.group, size)
    keys, values = old[0].copy(), old[1].copy()
    keys[:, position] = turned(x[plan.n_kv * plan.group : -plan.n_kv], c[position], s[position])
    values[:, position] = x[-plan.n_kv :]
    begin = 0 if plan.window is None else max(0, position - plan.window + 1)
    scores = np.einsum("hgd,hkd->hgk", q, keys[:, begin : position + 1]) * plan.scale
    if plan.cap is not None:
        scores = plan.cap * np.tanh(scores / plan.cap)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("hgk,hkd->hgd", powers / powers.sum(-1, keepdims=True), values[:, begin : position + 1])
    kv[:, :, position + 1 :] = np.nan if plan.dtype == "float32" else 0x7FFF  # nobody may look there
    where, partial = np.array([position], np.int64), np.full(plan.partial_floats, np.nan, np.float32)
    counter, out = np.zeros(plan.n_heads, np.int32), np.zeros((plan.n_kv, plan.group, size), qkv.dtype)
    buffers = (qkv, where, cos, sin, kv, partial, counter, out)
    found = []
    for _ in range(2):
        out.fill(np.nan if plan.dtype == "float32" else 0x7FFF)
        with simulator.allowed(*buffers, shared_bytes=plan.shared.total):
            kernel = cuda.jit(attention.make_kernel(plan, simulated_vectors))
            grid = plan.n_heads * plan.n_splits
            kernel[grid, attention.THREADS, 0, 0](*[b.ctypes.data for b in buffers])
        found.append(exact(out, plan.dtype))
    written = exact(kv[0, :, position], plan.dtype), exact(kv[1, :, position], plan.dtype)
    for a, b in zip(written, (keys[:, position], values[:, position]), strict=True):
        if relative_error(a.ravel(), b.ravel()) > LIMIT[plan.dtype]:
            return float("inf")
    return float("inf") if (found[0] != found[1]).any() else relative_error(found[0].ravel(), mixed.ravel())


def norm_error(plan: NormPlan) -> float:
    """Largest relative error of the new hidden state and of the normed one."""
    rng = np.random.default_rng(0)
    raw, exact_ = zip(*(stored(rng.standard_normal(plan.d_model), plan.dtype) for _ in range(4)), strict=True)
    hidden, y, inner_weight, weight = exact_

    def normed(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.square(x).mean() + plan.eps) * (scale + plan.offset)

    total = hidden + (normed(y, inner_weight) if plan.inner else y)
    outputs = [np.full_like(raw[0], np.nan if plan.dtype != "bfloat16" else 0x7FFF) for _ in range(2)]
    buffers = (*raw, *outputs)
    with simulator.allowed(*buffers, shared_bytes=128):
        kernel = cuda.jit(add_rms_norm.make_kernel(plan, simulated_vectors))
        kernel[1, plan.threads, 0, 0](*[b.ctypes.data for b in buffers])
    pairs = zip(outputs, (total, normed(total, weight)), strict=True)
    return max(relative_error(exact(a, plan.dtype), b) for a, b in pairs)


def exact(raw: np.ndarray, dtype: str) -> np.ndarray:
    """What is stored, in float64."""
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.astype(np.float64)


def main(names: list[str]) -> None:
    """Run cases NAME[:POSITION]."""
    for name in names:
        case, _, position = name.partition(":")
        plan = (NORM | ATTENTION)[case]
        error = norm_error(plan) if isinstance(plan, NormPlan) else attention_error(replace(plan), int(position))
        sys.stdout.write(f"{name} {'ok' if error <= LIMIT[plan.dtype] else f'error {error:.3g}'}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
