"""Where each architecture of transformers keeps what a decode step needs, by the ``model_type`` of its config.

A new family is one entry here and its tiny twin in ``tests/conftest.py``, whose decode steps are then held against the
model's own forward pass. The MLP is found by `suite.modeling.gated_mlp`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from suite.errors import InputError
from suite.registry import did_you_mean

_HERE = "suite/decoding/families.py"


@dataclass(frozen=True)
class Family:
    """Attribute paths of what a decode step reads; an entry gives those in which it differs from Llama.

    Parameters
    ----------
    embedding, rotary, layers, last_norm, head : modules of the model
    context, n_kv, eps : numbers of the model: longest context, heads of keys and values a layer, epsilon of the norms
    logit_cap : cap of the model's logits; None if it has no such attribute, or if that is None
    attention, before_attention, before_mlp : modules of a layer: its attention, and the norms whose outputs attention and
        MLP take
    after_attention, after_mlp : norm of what attention and MLP give, before it is added to the hidden state; "" for none
    qkv : modules of the attention whose outputs, laid end to end, are queries, keys and values
    out : module that its mixed values go through
    head_norms : its norms of each query and of each key, if it has them
    head_dim, scale : its numbers: entries of a head, factor of the scores
    score_cap, window : its cap of the scores, and the tokens it looks back at; None as for ``logit_cap``
    rotation : its attribute, and the rotary module's argument, that says which of several rotations it takes; None as for
        ``logit_cap``
    norm_offset : norms scale by ``weight + norm_offset``
    """

    embedding: str = "model.embed_tokens"
    rotary: str = "model.rotary_emb"
    layers: str = "model.layers"
    last_norm: str = "model.norm"
    head: str = "lm_head"
    context: str = "config.max_position_embeddings"
    n_kv: str = "config.num_key_value_heads"
    eps: str = "config.rms_norm_eps"
    logit_cap: str = "config.final_logit_softcapping"

    attention: str = "self_attn"
    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    head_norms: tuple[str, str] | None = None
    head_dim: str = "head_dim"
    scale: str = "scaling"
    score_cap: str = "attn_logit_softcapping"
    window: str = "sliding_window"
    rotation: str = "layer_type"

    norm_offset: float = 0.0


_OF_CONFIG = "config.sliding_window"  # the same in every layer, and no attribute of the attention
_HEAD_NORMS = ("q_norm", "k_norm")
_GEMMA = Family(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    norm_offset=1.0,
)
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(window=_OF_CONFIG),
    "qwen2": Family(),
    "qwen3": Family(head_norms=_HEAD_NORMS),
    "gemma2": _GEMMA,
    "gemma3_text": replace(_GEMMA, head_norms=_HEAD_NORMS),
    "phi3": Family(qkv=("qkv_proj",), window=_OF_CONFIG),
}


def family_of(model: Any) -> Family:
    """Family of a causal language model of transformers.

    Raises
    ------
    InputError
        An architecture that has no entry.
    """
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if kind not in FAMILIES:
        raise InputError(f"architecture {kind!r} has no decode step{did_you_mean(kind, FAMILIES)}; add it to {_HERE}")
    return FAMILIES[kind]


def at(root: Any, path: str) -> Any:
    """What lies at an attribute path ("model.layers") of a model, a layer or an attention.

    Raises
    ------
    InputError
        Nothing lies there: the entry of the architecture is wrong.
    """
    try:
        return attrgetter(path)(root)
    except AttributeError:
        raise InputError(f"{type(root).__name__} has no {path}: correct its family in {_HERE}") from None


def at_or_none(root: Any, path: str) -> Any:
    """As `at`; None where an architecture has nothing of the kind."""
    try:
        return attrgetter(path)(root)
    except AttributeError:
        return None
