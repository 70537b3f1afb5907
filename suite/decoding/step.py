"""A decode step over the weights of a Hugging Face model: batch 1, static cache, few launches, any MLP put in.

What lies outside the large products comes from `suite.decoding.parts`, on a GPU from `suite.decoding.parts_cuda`. The MLP is
a callable, so that methods and dense differ in nothing else. Nothing waits for the device: a step can be captured in a CUDA
graph, which then feeds itself its next token.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from suite.decoding.families import Family, at, at_or_none, family_of
from suite.decoding.parts import CHUNK, Heads, Parts
from suite.errors import InputError
from suite.modeling.gated_mlp import GatedMLP, find_gated_mlps

Mlp = Callable[[int, Tensor, Tensor], Tensor]  # (layer, x, the block's input behind its first norm), (1, d_model) -> y


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
    """Attention of one layer, with its own weights and cache."""

    def __init__(
        self, own: Any, family: Family, n_kv: int, eps: float, rotary: tuple[Tensor, Tensor], length: int
    ) -> None:
        self.weight, self.bias = fuse([at(own, name) for name in family.qkv])
        out = at(own, family.out)
        self.out: Tensor = out.weight
        self._out_bias: Tensor | None = out.bias
        head_dim = int(at(own, family.head_dim))
        queries, keys = family.head_norms or ("", "")
        self.heads = Heads(
            n_heads=len(self.weight) // head_dim - 2 * n_kv,
            n_kv=n_kv,
            head_dim=head_dim,
            cos=rotary[0],
            sin=rotary[1],
            cache=torch.zeros((2, n_kv, length, head_dim), dtype=self.weight.dtype, device=self.weight.device),
            scale=float(at(own, family.scale)),
            cap=at_or_none(own, family.score_cap),
            window=at_or_none(own, family.window),
            norms=None if not queries else (_weight(own, queries), _weight(own, keys)),
            offset=family.norm_offset,
            eps=eps,
        )

    def __call__(self, x: Tensor, position: Tensor, parts: Parts) -> Tensor:
        mixed = parts.attend(self.heads, parts.linear(x, self.weight, self.bias), position)
        return parts.linear(mixed, self.out, self._out_bias)

    def fill(self, keys: Tensor, values: Tensor, n_tokens: int) -> None:
        """Put in keys and values (1, n_kv, n_kept, head_dim) of a prefill; a window keeps fewer than all tokens."""
        n_kept = keys.shape[2]
        self.heads.cache[0, :, n_tokens - n_kept : n_tokens] = keys[0]
        self.heads.cache[1, :, n_tokens - n_kept : n_tokens] = values[0]


def _weight(root: nn.Module, path: str) -> Tensor:
    weight: Tensor = at(root, path).get_parameter("weight")
    return weight


class _Norms:
    """Weights of the norms of one layer; None where the architecture has no such norm."""

    def __init__(self, block: nn.Module, family: Family) -> None:
        self.before_attention = _weight(block, family.before_attention)
        self.before_mlp = _weight(block, family.before_mlp)
        self.after_attention = _weight(block, family.after_attention) if family.after_attention else None
        self.after_mlp = _weight(block, family.after_mlp) if family.after_mlp else None


class DecodeModel:
    """Decode steps of one sequence on a model's own weights.

    Parameters
    ----------
    model : nn.Module
        Hugging Face causal language model of a supported architecture. Weights that are read together (q, k and v; gate
        and up) are laid out as one; their values stay.
    length : int
        Tokens that the cache holds; rounded up to a multiple of 256.
    parts : Parts, optional
        Those of an earlier object of the same model, which have measured and compiled already.

    Attributes
    ----------
    token, position : Tensor, shape (1,), int64
        Input of the next step.
    """

    def __init__(self, model: nn.Module, length: int, parts: Parts | None = None) -> None:
        self._family = family = family_of(model)
        self.model, self.length = model, CHUNK * math.ceil(length / CHUNK)
        self.mlps: list[GatedMLP] = find_gated_mlps(model)
        weight = self.mlps[0].weights()[2]
        self.device, self.dtype = weight.device, weight.dtype
        context = int(at(model, family.context))
        if length > context:
            raise InputError(f"{length} tokens: over the context of {context} of {type(model).__name__}; use fewer")
        self._embed: nn.Module = at(model, family.embedding)
        self._norm_eps, n_kv = float(at(model, family.eps)), int(at(model, family.n_kv))
        self._cap = at_or_none(model, family.logit_cap)
        blocks: list[nn.Module] = list(at(model, family.layers))
        self.attentions = [
            _Attention(own, family, n_kv, self._norm_eps, self._rotary(own), self.length)
            for own in (at(block, family.attention) for block in blocks)
        ]
        self._norms = [_Norms(block, family) for block in blocks]
        self._last_norm = _weight(model, family.last_norm)
        self._gate_up = [fuse([mlp.module.get_submodule(name) for name in mlp.names.first]) for mlp in self.mlps]
        self._down = [fuse([mlp.module.get_submodule(mlp.names.down)]) for mlp in self.mlps]
        self.head = _weight(model, family.head)
        self.parts = self._parts() if parts is None else parts
        self.token = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)

    def _parts(self) -> Parts:
        """On a GPU those in few launches, with the fastest products of this model's weights."""
        if self.device.type != "cuda":
            return Parts(self._family.norm_offset, self._norm_eps)
        from suite.decoding.parts_cuda import GpuParts  # late: needs CUDA

        parts = GpuParts(self._family.norm_offset, self._norm_eps, self.mlps[0].d_model, self.dtype)
        kinds = [[a.weight for a in self.attentions], [a.out for a in self.attentions]]
        kinds += [[weight for weight, _ in layers] for layers in (self._gate_up, self._down)]
        with torch.no_grad():
            parts.measure([*kinds, [self.head]])
        return parts

    def _rotary(self, attention: Any) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position, (length, rotary_dim)."""
        family = self._family
        rotary, kind = at(self.model, family.rotary), at_or_none(attention, family.rotation)
        if kind not in self._rotations:
            positions = torch.arange(self.length, device=self.device)[None]
            like = torch.zeros(1, 1, 1, dtype=self.dtype, device=self.device)
            takes_kind = family.rotation in inspect.signature(rotary.forward).parameters
            with torch.no_grad():
                cos, sin = rotary(like, positions, kind) if takes_kind else rotary(like, positions)
            self._rotations[kind] = cos[0].to(self.dtype), sin[0].to(self.dtype)
        return self._rotations[kind]

    @cached_property
    def _rotations(self) -> dict[str | None, tuple[Tensor, Tensor]]:
        return {}

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

    def dense(self, layer: int, x: Tensor, _block: Tensor) -> Tensor:
        """The dense MLP: two products."""
        product = self.parts.act(self.parts.linear(x, *self._gate_up[layer]), self.mlps[layer].activation)
        return self.parts.linear(product, *self._down[layer])

    @torch.no_grad()
    def hidden(self, mlp: Mlp) -> Tensor:
        """Normed hidden state of the next token, shape (1, d_model); writes its keys and values."""
        hidden = self._embed(self.token)
        x = self.parts.norm(hidden, self._norms[0].before_attention)
        following = [norms.before_attention for norms in self._norms[1:]] + [self._last_norm]
        for layer, (norms, after) in enumerate(zip(self._norms, following, strict=True)):
            block = x
            y = self.attentions[layer](block, self.position, self.parts)
            hidden, x = self.parts.add_norm(hidden, y, norms.after_attention, norms.before_mlp)
            hidden, x = self.parts.add_norm(hidden, mlp(layer, x, block), norms.after_mlp, after)
        return x

    def logits(self, hidden: Tensor, *, wide: bool = False) -> Tensor:
        """Logits (1, vocabulary); ``wide``: product in fp32."""
        found = functional.linear(hidden.float(), self.head.float()) if wide else functional.linear(hidden, self.head)
        return found if self._cap is None else torch.tanh(found / self._cap) * self._cap

    @torch.no_grad()
    def step(self, mlp: Mlp) -> None:
        """One greedy step: token and position become the next ones."""
        self.token.copy_(self.parts.next_token(self.hidden(mlp), self.head))
        self.position.add_(1)
