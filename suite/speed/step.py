"""A decode step over the weights of a Hugging Face model: batch 1, static cache, few launches, any MLP put in.

Everything outside the large products is a handful of small functions, compiled by torch on a GPU: a layer costs 13
launches instead of about 50. The MLP is a callable, so that methods and dense differ in nothing else. Nothing waits for
the device: a step can be captured in a CUDA graph, which then feeds itself its next token.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from suite.errors import InputError
from suite.modeling.gated_mlp import GatedMLP, find_gated_mlps

Mlp = Callable[[int, Tensor], Tensor]  # (layer, x of shape (1, d_model)) -> y

_CHUNK = 256  # keys that one product of probabilities and values sums: long contexts fill the device with chunks


def _norm(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    """RMS norm, scaled by ``weight + offset`` in fp32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * (weight.float() + offset)).to(x.dtype)


def _add_norm(hidden: Tensor, y: Tensor, weight: Tensor, offset: float, eps: float) -> tuple[Tensor, Tensor]:
    hidden = hidden + y
    return hidden, _norm(hidden, weight, offset, eps)


def _norm_add_norm(
    hidden: Tensor, y: Tensor, first: Tensor, weight: Tensor, offset: float, eps: float
) -> tuple[Tensor, Tensor]:
    hidden = hidden + _norm(y, first, offset, eps)
    return hidden, _norm(hidden, weight, offset, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads (n_heads, head_dim); only the first ``cos.shape[-1]`` entries turn."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-high, low], -1) * sin, rest], -1)


def _heads(
    qkv: Tensor, position: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv: int, norms: tuple[Tensor, Tensor] | None,
    offset: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Queries (n_kv, group, head_dim), and keys with values (2, n_kv, 1, head_dim), of one token."""
    heads = qkv.view(n_heads + 2 * n_kv, -1)
    q, k, v = heads.split([n_heads, n_kv, n_kv])
    if norms is not None:
        q, k = _norm(q, norms[0], offset, eps), _norm(k, norms[1], offset, eps)
    cos, sin = cos.index_select(0, position), sin.index_select(0, position)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    return q.view(n_kv, n_heads // n_kv, -1), torch.stack([k, v])[:, :, None]


def _probabilities(scores: Tensor, position: Tensor, scale: float, cap: float | None, window: int | None) -> Tensor:
    """Softmax in fp32 over the keys written so far, shape of the scores (n_kv, group, length)."""
    wide = scores.float() * scale
    if cap is not None:
        wide = torch.tanh(wide / cap) * cap
    keys = torch.arange(scores.shape[-1], device=scores.device)
    hidden = keys > position
    if window is not None:
        hidden = hidden | (keys <= position - window)
    return torch.softmax(wide.masked_fill(hidden, -math.inf), -1).to(scores.dtype)


def _act(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return (functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")) * up


@dataclass(frozen=True)
class _Functions:
    norm: Callable[..., Tensor]
    add_norm: Callable[..., tuple[Tensor, Tensor]]
    norm_add_norm: Callable[..., tuple[Tensor, Tensor]]
    heads: Callable[..., tuple[Tensor, Tensor]]
    probabilities: Callable[..., Tensor]
    act: Callable[..., Tensor]

    @classmethod
    def of(cls, device: torch.device, compiled: bool) -> _Functions:
        plain: tuple[Any, ...] = (_norm, _add_norm, _norm_add_norm, _heads, _probabilities, _act)
        if not compiled or device.type != "cuda":
            return cls(*plain)
        torch.compiler.reset()  # one model at a time, or the shapes of many would reach the limit of recompilations
        compiled_all: list[Any] = [torch.compile(function, dynamic=False) for function in plain]
        return cls(*compiled_all)


def fuse(linears: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """One weight (sum of outputs, inputs), and bias, of which the linears' own become views; equal in every value."""
    weights = [linear.get_parameter("weight") for linear in linears]
    biases = [linear.get_parameter("bias") for linear in linears if getattr(linear, "bias", None) is not None]
    found: list[Tensor | None] = []
    for parts in (weights, biases):
        if len(parts) < 2:
            found.append(parts[0].data if parts else None)
            continue
        whole, start = torch.cat([part.data for part in parts]), 0
        for part in parts:
            part.data = whole[start : start + len(part)]
            start += len(part)
        found.append(whole)
    if found[0] is None:
        raise InputError("no linear layer to fuse")
    return found[0], found[1]


class _Attention:
    """Attention of one layer, its cache of keys and values, and the norms around."""

    def __init__(self, block: nn.Module, rotary: tuple[Tensor, Tensor], length: int, offset: float, n_kv: int) -> None:
        own: Any = block.get_submodule("self_attn")
        fused = hasattr(own, "qkv_proj")
        self.weight, self.bias = fuse([own.qkv_proj] if fused else [own.q_proj, own.k_proj, own.v_proj])
        self.out = own.o_proj
        self.head_dim, self.n_kv = own.head_dim, n_kv
        self.n_heads = len(self.weight) // own.head_dim - 2 * n_kv
        self.norms = (own.q_norm.weight, own.k_norm.weight) if hasattr(own, "q_norm") else None
        self.cos, self.sin = rotary
        self.scale = float(own.scaling)
        self.cap = getattr(own, "attn_logit_softcapping", None)
        self.window = getattr(own, "sliding_window", None)
        self.offset, self.eps = offset, _eps(own.q_norm) if self.norms else 0.0
        shape = (2, n_kv, length, self.head_dim)
        self.cache = torch.zeros(shape, dtype=self.weight.dtype, device=self.weight.device)

    def __call__(self, x: Tensor, position: Tensor, f: _Functions) -> Tensor:
        qkv = functional.linear(x, self.weight, self.bias)
        q, kv = f.heads(
            qkv, position, self.cos, self.sin, self.n_heads, self.n_kv, self.norms, self.offset, self.eps
        )  # fmt: skip
        self.cache.index_copy_(2, position, kv)
        keys, values = self.cache[0], self.cache[1]
        p = f.probabilities(q @ keys.transpose(1, 2), position, self.scale, self.cap, self.window)
        chunk = min(_CHUNK, p.shape[-1])
        n_chunks = p.shape[-1] // chunk
        p = p.view(self.n_kv, -1, n_chunks, chunk).transpose(1, 2)
        mixed = (p @ values.view(self.n_kv, n_chunks, chunk, -1)).sum(1)
        y: Tensor = self.out(mixed.view(1, -1))
        return y

    def fill(self, keys: Tensor, values: Tensor, n_tokens: int) -> None:
        """Put in keys and values (1, n_kv, n_kept, head_dim) of a prefill; a window keeps fewer than all tokens."""
        n_kept = keys.shape[2]
        self.cache[0, :, n_tokens - n_kept : n_tokens] = keys[0]
        self.cache[1, :, n_tokens - n_kept : n_tokens] = values[0]


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


class DecodeModel:
    """Decode steps of one sequence on a model's own weights.

    Parameters
    ----------
    model : nn.Module
        Hugging Face causal language model of a supported architecture. Weights that are read together (q, k and v; gate
        and up) are laid out as one; their values stay.
    length : int
        Tokens that the cache holds; rounded up to a multiple of 256.
    compiled : bool
        Compile what lies outside the products; on a GPU only.

    Attributes
    ----------
    token, position : Tensor, shape (1,), int64
        Input of the next step.
    """

    def __init__(self, model: nn.Module, length: int, *, compiled: bool = True) -> None:
        self.model, self.length = model, _CHUNK * math.ceil(length / _CHUNK)
        inner: Any = model.get_submodule("model")
        self._inner = inner
        self.mlps: list[GatedMLP] = find_gated_mlps(model)
        weight = self.mlps[0].weights()[2]
        self.device, self.dtype = weight.device, weight.dtype
        config: Any = model.config
        context = int(config.max_position_embeddings)
        if length > context:
            raise InputError(f"{length} tokens: over the context of {context} of {type(model).__name__}; use fewer")
        self.blocks: list[Any] = list(inner.layers)
        self._offset = _norm_offset(self._inner.norm)
        self._norm_eps = _eps(self._inner.norm)
        self._cap = getattr(config, "final_logit_softcapping", None)
        self.attentions = [
            _Attention(block, self._rotary(block), self.length, self._offset, int(config.num_key_value_heads))
            for block in self.blocks
        ]
        self._gate_up = [
            fuse([mlp.module.get_submodule(name) for name in (("gate_up_proj",) if mlp.fused else ("gate_proj", "up_proj"))])[0]
            for mlp in self.mlps
        ]  # fmt: skip
        self.head: Tensor = model.get_submodule("lm_head").get_parameter("weight")
        self.f = _Functions.of(self.device, compiled)
        self.token = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)

    def _rotary(self, block: Any) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position, (length, rotary_dim)."""
        rotary, kind = self._inner.rotary_emb, getattr(block.self_attn, "layer_type", None)
        if kind not in self._rotations:
            positions = torch.arange(self.length, device=self.device)[None]
            like = torch.zeros(1, 1, 1, dtype=self.dtype, device=self.device)
            takes_kind = "layer_type" in inspect.signature(rotary.forward).parameters
            with torch.no_grad():
                cos, sin = rotary(like, positions, kind) if takes_kind else rotary(like, positions)
            self._rotations[kind] = cos[0].to(self.dtype), sin[0].to(self.dtype)
        return self._rotations[kind]

    @cached_property
    def _rotations(self) -> dict[str | None, tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def _embedding_scale(self) -> Tensor | None:
        """Factor between the embedding and the first layer's input, where the model itself applies one."""
        seen: list[Tensor] = []
        handle = self.blocks[0].register_forward_pre_hook(
            lambda _module, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0]), with_kwargs=True
        )
        ids = torch.ones(1, 1, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            self.model(input_ids=ids, use_cache=False)
            plain = self._inner.embed_tokens(ids)
        handle.remove()
        root = torch.tensor(plain.shape[-1] ** 0.5, dtype=self.dtype, device=self.device)
        return None if torch.equal(seen[0], plain) else root

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Dense pass over a prompt (1, n_tokens), which is put into the cache; the logits of its last token, (1, vocabulary).

        The next step then continues with the likeliest token.

        Raises
        ------
        InputError
            No token, or more than the cache holds.
        """
        n_tokens = int(ids.shape[1])
        if not 1 <= n_tokens < self.length:
            raise InputError(
                f"prompt of {n_tokens} tokens: must be 1 to {self.length - 1}, the cache has {self.length}"
            )
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        for attention, layer in zip(self.attentions, out.past_key_values.layers, strict=True):
            attention.fill(layer.keys, layer.values, n_tokens)
        logits: Tensor = out.logits[:, -1]
        self.rewind(int(logits.argmax()), n_tokens)
        return logits

    def rewind(self, token: int, position: int) -> None:
        """Set the next step's input; what the cache holds from that position on is not looked at."""
        self.token.fill_(token)
        self.position.fill_(position)

    def dense(self, layer: int, x: Tensor) -> Tensor:
        """The dense MLP: two products."""
        product = self.f.act(functional.linear(x, self._gate_up[layer]), self.mlps[layer].activation)
        return self.mlps[layer].down(product)

    @torch.no_grad()
    def hidden(self, mlp: Mlp) -> Tensor:
        """Normed hidden state of the next token, shape (1, d_model); writes its keys and values."""
        hidden = self._inner.embed_tokens(self.token)
        if self._embedding_scale is not None:
            hidden = hidden * self._embedding_scale
        x = self.f.norm(hidden, self.blocks[0].input_layernorm.weight, self._offset, self._norm_eps)
        for layer, (block, attention) in enumerate(zip(self.blocks, self.attentions, strict=True)):
            last = layer + 1 == len(self.blocks)
            after = self._inner.norm if last else self.blocks[layer + 1].input_layernorm
            around = hasattr(block, "pre_feedforward_layernorm")  # Gemma norms what attention and MLP give, too
            before = block.pre_feedforward_layernorm if around else block.post_attention_layernorm
            y = attention(x, self.position, self.f)
            hidden, x = self._add(hidden, y, block.post_attention_layernorm if around else None, before)
            hidden, x = self._add(hidden, mlp(layer, x), block.post_feedforward_layernorm if around else None, after)
        return x

    def _add(self, hidden: Tensor, y: Tensor, first: Any, norm: Any) -> tuple[Tensor, Tensor]:
        if first is None:
            return self.f.add_norm(hidden, y, norm.weight, self._offset, self._norm_eps)
        return self.f.norm_add_norm(hidden, y, first.weight, norm.weight, self._offset, self._norm_eps)

    def logits(self, hidden: Tensor, *, wide: bool = False) -> Tensor:
        """Logits (1, vocabulary); ``wide``: product in fp32."""
        found = functional.linear(hidden.float(), self.head.float()) if wide else functional.linear(hidden, self.head)
        return found if self._cap is None else torch.tanh(found / self._cap) * self._cap

    @torch.no_grad()
    def step(self, mlp: Mlp) -> None:
        """One greedy step: token and position become the next ones."""
        self.token.copy_(self.logits(self.hidden(mlp)).argmax(-1))
        self.position.add_(1)


def _norm_offset(norm: Any) -> float:
    """1 where the scale is ``1 + weight`` (Gemma), else 0: seen from its values."""
    ones = torch.ones(1, len(norm.weight), dtype=norm.weight.dtype, device=norm.weight.device)
    with torch.no_grad():
        scale = norm(ones)[0].float()
    weight = norm.weight.detach().float()
    return 1.0 if float((scale - weight - 1).abs().sum()) < float((scale - weight).abs().sum()) else 0.0
