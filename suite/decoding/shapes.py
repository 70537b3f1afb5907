"""Shapes to time: the paper's four models with random weights, and the embedded one as it is.

Sizes are those of the published configs; speed does not depend on the values of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from suite.devices import torch_dtype
from suite.errors import InputError
from suite.modeling.sources import EMBEDDED_NAME
from suite.registry import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its gated MLPs.

    Parameters
    ----------
    d_model, d_ff, activation : of one gated MLP
    n_layers, n_parameters : of the whole model (the embedding counts once where it is tied)
    config : class of transformers that makes the model with random weights; "" for a model with its own
    sizes : its other sizes
    """

    d_model: int
    d_ff: int
    activation: str = "silu"
    n_layers: int = 0
    n_parameters: int = 0
    config: str = ""
    sizes: dict[str, Any] = field(default_factory=dict)


SHAPES: dict[str, Shape] = {
    "embedded": Shape(576, 1536, n_layers=30, n_parameters=134_515_008),
    "llama-3.1-8b": Shape(
        4096, 14336, "silu", 32, 8_030_261_248, "LlamaConfig",
        {
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        },
    ),
    "gemma-2-9b": Shape(
        3584, 14336, "gelu_tanh", 42, 9_241_705_984, "Gemma2Config",
        {
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000,
            "query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-14b": Shape(
        5120, 13824, "silu", 48, 14_770_033_664, "Qwen2Config",
        {
            "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
    ),
    "phi-4": Shape(
        5120, 17920, "silu", 40, 14_659_507_200, "Phi3Config",
        {
            "num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 100352, "rms_norm_eps": 1e-5,
            "pad_token_id": 0, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip
_CONTEXT = 16384


def shape_of(name: str) -> Shape:
    """Shape of a name.

    Raises
    ------
    InputError
        Unknown name.
    """
    if name not in SHAPES:
        raise InputError(f"unknown shape {name!r}{did_you_mean(name, SHAPES)}")
    return SHAPES[name]


def has_weights(name: str) -> bool:
    """Whether a shape is a model with weights of its own, whose methods need fits."""
    return name in SHAPES and not SHAPES[name].config


def build_model(name: str, dtype: str, device: str, seed: int = 0) -> nn.Module:
    """A model in evaluation mode: ``embedded`` with its weights, the others built on the device with random ones.

    Raises
    ------
    InputError
        Unknown name, or the embedded model cannot be loaded.
    """
    import torch
    import transformers

    shape = shape_of(name)
    if not shape.config:
        from suite.modeling.loading import load_model

        loaded: nn.Module = load_model(name, dtype, device).model
        return loaded
    layers = {"hidden_size": shape.d_model, "intermediate_size": shape.d_ff, "num_hidden_layers": shape.n_layers}
    config = getattr(transformers, shape.config)(max_position_embeddings=_CONTEXT, **layers, **shape.sizes)
    torch.manual_seed(seed)
    with torch.device(device):  # each layer is made where it will lie: nothing of the model on the host
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype))
    return model.eval()


def model_name(name: str) -> str:
    """Name for the tables."""
    return f"{name}, random weights" if SHAPES[name].config else EMBEDDED_NAME


def prompt_tokens(name: str, n_tokens: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """A prompt (1, n_tokens), int64: English text of Python's documentation for real weights, else random tokens."""
    import torch

    if not has_weights(name):
        return torch.randint(0, vocabulary, (1, n_tokens), generator=torch.Generator().manual_seed(seed))
    import pydoc

    from transformers import AutoTokenizer

    from suite.modeling.convert import converted_folder
    from suite.modeling.loading import prepare_model

    ref = prepare_model(name)
    if ref.path is None:
        raise InputError(ref.remedy)
    tokenizer = AutoTokenizer.from_pretrained(converted_folder(ref.path), local_files_only=True)
    text = "".join(pydoc.plain(pydoc.render_doc(thing)) for thing in ("argparse.ArgumentParser", "str", "logging"))
    ids = tokenizer(text, return_tensors="pt").input_ids
    repeated: torch.Tensor = ids.repeat(1, -(-n_tokens // ids.shape[1]))[:, :n_tokens]
    return repeated
