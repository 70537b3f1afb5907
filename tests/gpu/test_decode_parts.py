"""The parts of a decode step in few launches against the same in torch: every head size, split, cap, window and norm."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from suite.decoding.parts import Heads, Parts
from suite.decoding.parts_cuda import GpuParts

# n_heads, n_kv, head_dim, rotary_dim, cap, window, norms: the four families of the paper, and what else there is
HEADS = {
    "llama": (32, 8, 128, 128, None, None, False),
    "gemma2": (16, 8, 256, 256, 50.0, None, False),
    "gemma2-window": (16, 8, 256, 256, 50.0, 100, False),
    "qwen2": (40, 8, 128, 128, None, None, False),
    "phi": (40, 10, 128, 64, None, None, False),
    "qwen3": (16, 8, 128, 128, None, None, True),
    "smollm": (9, 3, 64, 64, None, None, False),
    "gemma3": (4, 1, 256, 256, None, 512, True),
    "no-kernel": (4, 2, 80, 80, None, None, False),  # torch's functions take it
}
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def make_heads(name, length, dtype):
    n_heads, n_kv, size, rotary, cap, window, normed = HEADS[name]
    generator = torch.Generator(device="cuda").manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    angles = torch.randn(length, rotary // 2, device="cuda", generator=generator).repeat(1, 2)
    norms = (normal(size), normal(size)) if normed else None
    return Heads(
        n_heads=n_heads, n_kv=n_kv, head_dim=size, cos=angles.cos().to(dtype), sin=angles.sin().to(dtype),
        cache=normal(2, n_kv, length, size), scale=size**-0.5, cap=cap, window=window, norms=norms, offset=1.0, eps=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [512, 1536])
@pytest.mark.parametrize("name", HEADS)
def test_attention_equals_torch(name, length, dtype):
    """Also when a graph is replayed at other positions, and with the cache poisoned behind the position."""
    heads = make_heads(name, length, dtype)
    width = (heads.n_heads + 2 * heads.n_kv) * heads.head_dim
    gpu, exact = GpuParts(1.0, 1e-6, 64, dtype), Parts(1.0, 1e-6)
    wide = {k: getattr(heads, k).double() for k in ("cos", "sin", "cache")}
    norms = heads.norms and tuple(w.double() for w in heads.norms)
    reference = Heads(**{f: getattr(heads, f) for f in heads.__dataclass_fields__} | wide | {"norms": norms})
    qkv, position = torch.empty(1, width, device="cuda", dtype=dtype), torch.zeros(1, dtype=torch.int64, device="cuda")
    qkv.normal_()
    for _ in range(2):
        gpu.attend(heads, qkv, position)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gpu.attend(heads, qkv, position)
    for at in (0, 1, 255, 256, 300, length - 1):
        qkv.normal_()
        position.fill_(at)
        heads.cache.normal_()
        reference.cache.copy_(heads.cache)
        heads.cache[:, :, at:] = torch.nan if name != "no-kernel" else 0  # torch multiplies hidden values by 0
        found.fill_(torch.nan)
        graph.replay()
        expected = exact.attend(reference, qkv.double(), position)
        error = float((found.double() - expected).norm() / expected.norm())
        # in scores of size ~1: roundings of key and query to the dtype; then of the output, and of torch's own parts
        assert error < 8 * UNIT[dtype], (at, error)
        assert not found.isnan().any()
        written = heads.cache[:, :, at].double() - reference.cache[:, :, at]
        assert float(written.abs().max()) <= 4 * UNIT[dtype] * float(reference.cache[:, :, at].abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("d_model", [576, 640, 3584, 4096])
def test_norm_equals_float64(d_model, inner, dtype):
    gpu, exact = GpuParts(1.0, 1e-6, d_model, dtype), Parts(1.0, 1e-6)
    hidden, y, first, weight = (torch.randn(1, d_model, device="cuda").to(dtype) for _ in range(4))
    found = gpu.add_norm(hidden, y, first[0] if inner else None, weight[0])
    wide = [t.double() for t in (hidden, y, first[0], weight[0])]
    y64 = wide[1] / (wide[1].square().mean() + 1e-6).sqrt() * (wide[2] + 1) if inner else wide[1]
    total = wide[0] + y64
    normed = total / (total.square().mean() + 1e-6).sqrt() * (wide[3] + 1)
    for got, expected in zip(found, (total, normed), strict=True):
        assert float((got.double() - expected).norm() / expected.norm()) < 2 * UNIT[dtype] + 2**-20
    assert float((exact.add_norm(hidden, y, None, weight[0])[0] - (hidden + y)).abs().max()) == 0


@pytest.mark.parametrize("vocabulary", [128256, 256000, 152064, 100352, 49152, 64, 50257])
def test_next_token(vocabulary):
    gpu = GpuParts(0.0, 1e-6, 64, torch.bfloat16)
    hidden, head = torch.randn(1, 64, device="cuda").bfloat16(), torch.randn(vocabulary, 64, device="cuda").bfloat16()
    logits = (hidden @ head.T)[0]
    token = gpu.next_token(hidden, head)
    assert token.shape == (1,)
    assert float(logits[token]) == float(logits.max())
