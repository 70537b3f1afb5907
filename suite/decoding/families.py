"""Where each architecture of transformers keeps what a decode step needs, by the ``model_type`` of its config.

A new family is one entry here and its tiny twin in ``tests/conftest.py``, whose decode steps are then held against the
model's own forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from suite.errors import InputError
from suite.registry import did_you_mean


@dataclass(frozen=True)
class Family:
    """Names of modules in a decoder layer, and what its norms scale by.

    Parameters
    ----------
    qkv : modules of the attention whose outputs, laid end to end, are queries, keys and values
    head_norms : its norms of each query and of each key, if it has them
    after_attention, after_mlp : norm of what attention and MLP give, before it is added to the hidden state; "" for none
    before_mlp : norm whose output the MLP takes
    norm_offset : norms scale by ``weight + norm_offset``
    """

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    head_norms: tuple[str, str] | None = None
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""
    norm_offset: float = 0.0


_HEAD_NORMS = ("q_norm", "k_norm")
_GEMMA = Family(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    norm_offset=1.0,
)
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(head_norms=_HEAD_NORMS),
    "gemma2": _GEMMA,
    "gemma3_text": replace(_GEMMA, head_norms=_HEAD_NORMS),
    "phi3": Family(qkv=("qkv_proj",)),
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
        raise InputError(
            f"architecture {kind!r} has no decode step{did_you_mean(kind, FAMILIES)}; "
            "add it to suite/decoding/families.py"
        )
    return FAMILIES[kind]
