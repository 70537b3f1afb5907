"""Whole models to decode with: the paper's four at full shape with random weights, and the embedded one as it is.

Sizes are those of the published configs; speed does not depend on the values of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from suite.errors import InputError
from suite.modeling.sources import EMBEDDED_NAME
from suite.registry import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class ModelShape:
    """Config class of transformers, its sizes, and parameters in all (the embedding counts once where tied)."""

    config: str
    sizes: dict[str, Any] = field(default_factory=dict)
    n_parameters: int = 0


MODEL_SHAPES: dict[str, ModelShape] = {
    "embedded": ModelShape("", n_parameters=134_515_008),
    "llama-3.1-8b": ModelShape(
        "LlamaConfig",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
        8_030_261_248,
    ),
    "gemma-2-9b": ModelShape(
        "Gemma2Config",
        {
            "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000, "query_pre_attn_scalar": 256,
            "sliding_window": 4096, "tie_word_embeddings": True,
        },
        9_241_705_984,
    ),
    "qwen2.5-14b": ModelShape(
        "Qwen2Config",
        {
            "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        },
        14_770_033_664,
    ),
    "phi-4": ModelShape(
        "Phi3Config",
        {
            "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40,
            "num_key_value_heads": 10, "vocab_size": 100352, "rms_norm_eps": 1e-5, "pad_token_id": 0,
            "tie_word_embeddings": False,
        },
        14_659_507_200,
    ),
}  # fmt: skip
_COMMON = {"max_position_embeddings": 16384}


def has_weights(name: str) -> bool:
    """Whether a shape is a model with weights of its own, whose methods need fits."""
    return name in MODEL_SHAPES and not MODEL_SHAPES[name].config


def build_model(name: str, dtype: torch.dtype, device: str, seed: int = 0) -> nn.Module:
    """A model in evaluation mode: ``embedded`` with its weights, the others built on the device with random ones.

    Raises
    ------
    InputError
        Unknown name, or the embedded model cannot be had.
    """
    import torch
    import transformers

    if name not in MODEL_SHAPES:
        raise InputError(f"unknown model shape {name!r}{did_you_mean(name, MODEL_SHAPES)}")
    shape = MODEL_SHAPES[name]
    if not shape.config:
        from suite.modeling.loading import load_model

        loaded: nn.Module = load_model(name, str(dtype).removeprefix("torch."), device).model
        return loaded
    config = getattr(transformers, shape.config)(**_COMMON | shape.sizes)
    torch.manual_seed(seed)
    with torch.device(device):  # each layer is made where it will lie: nothing of the model on the host
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def model_name(name: str) -> str:
    """Name for the tables."""
    return f"{name}, random weights" if MODEL_SHAPES[name].config else EMBEDDED_NAME


def prompt_tokens(name: str, n_tokens: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """A prompt (1, n_tokens), int64: English text of Python's documentation for real weights, else random tokens."""
    import torch

    if name != "embedded":
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
