"""Dense contexts of requests as keys and values, computed once and shared by continuations and by settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from suite.errors import CellError

Context = tuple[int, ...]
_LAYERS = {"full_attention", "sliding_attention"}
# Rotary embeddings whose angles depend on a token's position alone; longrope and dynamic change with the input's length.
_ROTARY = {"default", "linear", "llama3", "yarn", "proportional"}


def can_share_contexts(model: Any) -> bool:
    """Whether keys and values of a prefix are the same whatever follows it, and lie in one plain cache layer a layer."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    return kinds <= _LAYERS and not shared and set(_rotary_types(getattr(config, "rope_parameters", None))) <= _ROTARY


def depends_on_batch(model: Any) -> bool:
    """Whether a document's scores may depend on the longer documents beside it: angles follow the width of the batch."""
    config = model.config.get_text_config(decoder=True)
    return not set(_rotary_types(getattr(config, "rope_parameters", None))) <= _ROTARY


def _rotary_types(parameters: Any) -> Iterator[str]:
    """Values of ``rope_type``: one for the model, or one for each kind of attention layer."""
    if isinstance(parameters, Mapping):
        if "rope_type" in parameters:
            yield parameters["rope_type"]
        for value in parameters.values():
            yield from _rotary_types(value)


def bytes_per_token(model: Any) -> int:
    """Bytes that one token's keys and values take in all layers."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(heads) * int(head_dim) * int(model.dtype.itemsize)


class _SharedLayer(DynamicLayer):
    """One layer's keys and values of a batch's contexts, gathered when the layer runs and not kept."""

    def __init__(self, keys: Tensor, values: Tensor, index: Tensor) -> None:
        super().__init__()
        self._flat, self._index = (keys, values), index
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Width of the contexts, padding included."""
        return int(self._index.shape[1])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Contexts and continuations joined, shape (batch, heads, width + n_new, head_dim)."""
        batch, width = self._index.shape
        joined = []
        for flat, new in zip(self._flat, (key_states, value_states), strict=True):
            past = flat.index_select(0, self._index.flatten()).view(batch, width, *flat.shape[1:])
            joined.append(torch.cat([past.transpose(1, 2), new], dim=-2))
        return joined[0], joined[1]


class DenseContexts:
    """Keys and values of distinct contexts, one context after another, shape (n_tokens, n_heads, head_dim) a layer.

    Parameters
    ----------
    contexts : distinct token sequences, none of them empty
    forward : runs the dense model on right-padded ids (batch, width), where a causal model never looks, into a cache
    max_tokens : most positions in a batch
    pad_token : any token id
    """

    def __init__(
        self,
        contexts: Sequence[Context],
        forward: Callable[[Tensor, Cache], None],
        *,
        max_tokens: int,
        pad_token: int,
    ) -> None:
        order = sorted(contexts, key=lambda context: (-len(context), context))
        total = sum(map(len, order))
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._starts: dict[Context, int] = {}
        filled = 0
        while order:
            batch = order[: max(1, max_tokens // len(order[0]))]
            order = order[len(batch) :]
            width = len(batch[0])
            cache = DynamicCache()
            forward(torch.tensor([[*c, *[pad_token] * (width - len(c))] for c in batch]), cache)
            real = torch.cat([torch.arange(len(c)) + row * width for row, c in enumerate(batch)])
            self._take(cache, real, filled, total)
            for context in batch:
                self._starts[context] = filled
                filled += len(context)

    def _take(self, cache: Cache, real: Tensor, filled: int, total: int) -> None:
        """Copy a batch's keys and values without its padding."""
        for number, layer in enumerate(cache.layers):
            for kept, new in ((self.keys, layer.keys), (self.values, layer.values)):
                if new is None:
                    raise CellError(f"attention layer {number} left no keys: contexts cannot be shared")
                if number == len(kept):
                    kept.append(new.new_empty(total, new.shape[1], new.shape[3]))
                flat = new.transpose(1, 2).flatten(0, 1).index_select(0, real.to(new.device))
                kept[number][filled : filled + len(flat)] = flat

    def of(self, contexts: Sequence[Context], device: torch.device) -> Cache:
        """Cache of a batch, its contexts padded on the left, so that distances to the continuation are right.

        Distances count: a sliding window is measured in columns of the cache.
        """
        lengths = torch.tensor([len(context) for context in contexts])
        starts = torch.tensor([self._starts.get(context, 0) for context in contexts])
        width = int(lengths.max())
        index = (starts[:, None] + torch.arange(width) - (width - lengths)[:, None]).clamp(min=0).to(device)
        return Cache(layers=[_SharedLayer(k, v, index) for k, v in zip(self.keys, self.values, strict=True)])
