"""The parts of a decode step on a GPU in few launches, for every method and for dense alike.

A dense layer of the Llama-3.1-8B shape takes 161 us and 8 launches (H100, 128 tokens of context; 194 us and 18 with torch's
own functions, compiled where that helps). Attention is one launch (`kernels_numba.gpu.decode.attention`: 8 instead of 24 us), so
is each addition with its norm. Products of one row are left to torch.compile where it is faster than the library behind
``F.linear``: 76 instead of 82 us for gate and up, 39 instead of 44 for down, 13 instead of 16 for the attention's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from kernels_numba.gpu.decode.add_rms_norm import NormPlan
from kernels_numba.gpu.decode.attention import AttentionPlan
from kernels_numba.gpu.host.decode import AddNorm, DecodeAttention
from suite.decoding.graphs import captured
from suite.decoding.parts import Heads, Parts, act, head_norms, norm
from suite.devices import dtype_name

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_REPEATS = 5
_SHORT = 1536  # tokens of a cache that each query may read for itself


def _sum_of_products(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` as torch.compile makes one reduction of it, in fp32."""
    wide = (x.float() * weight.float()).sum(-1)
    return (wide if bias is None else wide + bias.float()).to(x.dtype)[None]


class GpuParts(Parts):
    """As `Parts`, by kernels; a model's heads of another size than theirs take torch's functions."""

    def __init__(self, offset: float, eps: float, d_model: int, dtype: torch.dtype) -> None:
        super().__init__(offset, eps)
        torch.compiler.reset()  # one model at a time, or the shapes of many would reach the limit of recompilations
        self._products: dict[tuple[int, ...], Product] = {}
        compiled: Product = torch.compile(_sum_of_products, mode="max-autotune-no-cudagraphs", dynamic=False)
        self._candidates = (functional.linear, compiled)
        self._norm = torch.compile(norm, dynamic=False)
        self._act = torch.compile(act, dynamic=False)
        self._head_norms = torch.compile(head_norms, dynamic=False)
        self._add_norms = [_add_norm(NormPlan(d_model, dtype_name(dtype), offset, eps, inner=i)) for i in (False, True)]
        self._attentions: WeakKeyDictionary[Heads, DecodeAttention | None] = WeakKeyDictionary()

    def measure(self, weights: Sequence[Sequence[Tensor]]) -> None:
        """Time the candidates on all layers' weights of a kind, so that none finds its own in L2; keep the faster."""
        for kind in weights:
            x = torch.randn(1, kind[0].shape[1], dtype=kind[0].dtype, device=kind[0].device)
            seconds = [_seconds(candidate, x, kind) for candidate in self._candidates]
            self._products[tuple(kind[0].shape)] = self._candidates[seconds.index(min(seconds))]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As `Parts`."""
        return self._products.get(tuple(weight.shape), functional.linear)(x, weight, bias)

    def add_norm(self, hidden: Tensor, y: Tensor, inner: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As `Parts`."""
        kernel = self._add_norms[inner is not None]
        if kernel is None:
            return super().add_norm(hidden, y, inner, weight)
        return kernel(hidden, y, inner, weight)

    def attend(self, heads: Heads, qkv: Tensor, position: Tensor) -> Tensor:
        """As `Parts`."""
        if heads not in self._attentions:
            self._attentions[heads] = _attention(heads)
        kernel = self._attentions[heads]
        if kernel is None:
            return super().attend(heads, qkv, position)
        return kernel(self.head_norms(heads, qkv), position)

    def next_token(self, hidden: Tensor, head: Tensor) -> Tensor:
        """As `Parts`, in two stages: torch's argmax of one row takes 37 us for 128256 entries, with one block."""
        logits = self.linear(hidden, head)
        rows = next((n for n in range(1024, 63, -1) if logits.numel() % n == 0), 1)
        largest, where = logits.view(rows, -1).max(-1)
        row = largest.argmax(0, keepdim=True)
        return where.gather(0, row) + row * (logits.numel() // rows)


def _add_norm(plan: NormPlan) -> AddNorm | None:
    """The kernel of a plan, if it takes its rows."""
    try:
        return AddNorm(plan)
    except ValueError:
        return None


def _attention(heads: Heads) -> DecodeAttention | None:
    """The kernel of a layer, if it takes its heads."""
    _, n_kv, length, head_dim = heads.cache.shape
    short, group = length <= _SHORT, heads.n_heads // n_kv
    plan = AttentionPlan(
        n_kv, group, head_dim, heads.cos.shape[-1], length, dtype_name(heads.cache.dtype), heads.scale, heads.cap,
        heads.window, queries=1 if short else group, split=512 if short else 256,
    )  # fmt: skip
    try:
        return DecodeAttention(plan, heads.cos, heads.sin, heads.cache)
    except ValueError:
        return None


def _seconds(product: Product, x: Tensor, weights: Sequence[Tensor]) -> float:
    """Shortest of a few passes over all weights, in a graph: compiled functions cost the host more than they take."""

    def once() -> None:
        for weight in weights:
            product(x, weight, None)

    graph = captured(once)
    found = []
    for _ in range(_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) * 1e-3)
    return min(found)
