"""What lies between the large products of a decode step, in plain torch: any device, any architecture.

`suite.decoding.parts_cuda` has the same parts in few launches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 256  # keys that one product of probabilities and values sums: long contexts fill the device with chunks


@dataclass(frozen=True, eq=False)
class Heads:
    """Attention of one layer: its cache of keys and values and the sizes and options that decide it.

    Parameters
    ----------
    n_heads, n_kv, head_dim : int
    cos, sin : Tensor, shape (length, rotary_dim)
        Rotary embedding of every position.
    cache : Tensor, shape (2, n_kv, length, head_dim)
    scale : float
        Of the scores.
    cap : float, optional
        Scores go through ``cap * tanh(score / cap)``.
    window : int, optional
        Tokens that are looked back at.
    norms : (Tensor, Tensor), optional
        RMS norms of queries and keys, (head_dim,), scaled by ``weight + offset``.
    """

    n_heads: int
    n_kv: int
    head_dim: int
    cos: Tensor
    sin: Tensor
    cache: Tensor
    scale: float
    cap: float | None
    window: int | None
    norms: tuple[Tensor, Tensor] | None
    offset: float
    eps: float


def norm(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    """RMS norm, scaled by ``weight + offset`` in fp32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * (weight.float() + offset)).to(x.dtype)


def head_norms(qkv: Tensor, norms: tuple[Tensor, Tensor], n_heads: int, n_kv: int, offset: float, eps: float) -> Tensor:
    """Queries and keys normed head by head; shape of ``qkv``."""
    q, k, v = qkv.view(n_heads + 2 * n_kv, -1).split([n_heads, n_kv, n_kv])
    q, k = (norm(part, weight, offset, eps) for part, weight in zip((q, k), norms, strict=True))
    return torch.cat([q, k, v]).view(1, -1)


def activate(gate: Tensor, activation: str) -> Tensor:
    """``act(g)`` of a name."""
    return functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")


def act(gate_up: Tensor, activation: str) -> Tensor:
    """``act(g) * u`` of both, laid end to end."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activate(gate, activation) * up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads (n_heads, head_dim); only the first ``cos.shape[-1]`` entries turn."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-high, low], -1) * sin, rest], -1)


def _probabilities(scores: Tensor, position: Tensor, heads: Heads) -> Tensor:
    """Softmax in fp32 over the keys written so far, shape of the scores (n_kv, group, length)."""
    wide = scores.float() * heads.scale
    if heads.cap is not None:
        wide = torch.tanh(wide / heads.cap) * heads.cap
    keys = torch.arange(scores.shape[-1], device=scores.device)
    hidden = keys > position
    if heads.window is not None:
        hidden = hidden | (keys <= position - heads.window)
    return torch.softmax(wide.masked_fill(hidden, -math.inf), -1).to(scores.dtype)


class Parts:
    """The parts of a step.

    Parameters
    ----------
    offset, eps : float
        Norms scale by ``weight + offset``.
    """

    def __init__(self, offset: float, eps: float) -> None:
        self.offset, self.eps = offset, eps
        self._norm, self._act, self._head_norms = norm, act, head_norms

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + b``, shape (1, outputs)."""
        return functional.linear(x, weight, bias)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm."""
        return self._norm(x, weight, self.offset, self.eps)

    def add_norm(self, hidden: Tensor, y: Tensor, inner: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden state plus ``y`` (normed by ``inner`` first, if given), and its norm."""
        hidden = hidden + (y if inner is None else self.norm(y, inner))
        return hidden, self.norm(hidden, weight)

    def head_norms(self, heads: Heads, qkv: Tensor) -> Tensor:
        """Queries and keys normed head by head, where the architecture does so."""
        if heads.norms is None:
            return qkv
        return self._head_norms(qkv, heads.norms, heads.n_heads, heads.n_kv, heads.offset, heads.eps)

    def attend(self, heads: Heads, qkv: Tensor, position: Tensor) -> Tensor:
        """Mixed values (1, n_heads * head_dim) of one token; writes its key and value into the cache."""
        q, k, v = (
            self.head_norms(heads, qkv)
            .view(heads.n_heads + 2 * heads.n_kv, -1)
            .split([heads.n_heads, heads.n_kv, heads.n_kv])
        )
        cos, sin = heads.cos.index_select(0, position), heads.sin.index_select(0, position)
        q, k = _rotate(q, cos, sin).view(heads.n_kv, -1, heads.head_dim), _rotate(k, cos, sin)
        heads.cache.index_copy_(2, position, torch.stack([k, v])[:, :, None])
        keys, values = heads.cache[0], heads.cache[1]
        p = _probabilities(q @ keys.transpose(1, 2), position, heads)
        chunk = min(CHUNK, p.shape[-1])
        n_chunks = p.shape[-1] // chunk
        p = p.view(heads.n_kv, -1, n_chunks, chunk).transpose(1, 2)
        return (p @ values.view(heads.n_kv, n_chunks, chunk, -1)).sum(1).view(1, -1)

    def act(self, gate_up: Tensor, activation: str) -> Tensor:
        """``act(g) * u`` of both, laid end to end."""
        return self._act(gate_up, activation)

    def next_token(self, hidden: Tensor, head: Tensor) -> Tensor:
        """The likeliest next token, shape (1,): a cap on the logits does not change which it is."""
        return self.linear(hidden, head).argmax(-1)
