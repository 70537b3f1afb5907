"""The header of a GGUF file, read in milliseconds: enough to refuse a damaged file before anything starts.

gguf's own reader takes 7 s for the embedded model, because it makes an array of each of its 98k tokenizer strings.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suite.errors import InputError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_GEMMA2_CAPS = {
    "gemma2.attn_logit_softcapping": 50.0,
    "gemma2.final_logit_softcapping": 30.0,
}  # as transformers has them


@dataclass(frozen=True)
class GGUFHeader:
    """What the header says: architecture, keys of its metadata, and the size the file must have."""

    architecture: str
    keys: frozenset[str]
    size_bytes: int
    adds_bos: bool  # texts begin with the token <bos>: tokenizer.ggml.add_bos_token
    dropped: tuple[str, ...] = ()  # what changes the model's output and transformers does not read
    tensors: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)  # None for arrays

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer travels in the file."""
        return "tokenizer.ggml.tokens" in self.keys


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read the header and check that the file is as long as it says.

    Raises
    ------
    InputError
        The file cannot be read, is empty, is not a GGUF file, or is truncated.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            raise InputError(f"model file {path} is empty: download it again")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise InputError(f"model file {path} is not a GGUF file: it does not begin with 'GGUF'")
            try:
                header = _Reader(data, path).header()
            except (struct.error, IndexError, UnicodeDecodeError, MemoryError, OverflowError, RecursionError) as error:
                raise InputError(
                    f"model file {path} is truncated or damaged in its header: download it again"
                ) from error
    except OSError as error:
        raise InputError(f"model file {path} cannot be read: {error.strerror}") from error
    if size < header.size_bytes:
        raise InputError(f"model file {path} is truncated: {size} of {header.size_bytes} bytes; download it again")
    return header


def _dropped(architecture: str, metadata: Mapping[str, Any], tensors: Sequence[str]) -> tuple[str, ...]:
    """Keys and tensors without which the model computes something else."""
    found = [name for name in tensors if name.startswith(("rope_freqs.", "rope_factors_"))]
    for key, value in metadata.items():
        name = key.removeprefix(f"{architecture}.")
        scaled = name == "rope.scaling.type" and value != "none"
        capped = name.endswith("logit_softcapping") and value and value != _GEMMA2_CAPS.get(key)
        if scaled or capped or name == "rope.scale_linear":
            found.append(key)
    return tuple(found)


def unread_settings(header: GGUFHeader, read: Mapping[str, Any]) -> list[str]:
    """Keys of the architecture that are not among those that are ``read``, unless they say what holds without them."""
    said = {
        key.removeprefix(f"{header.architecture}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{header.architecture}.")
    }
    heads, width = said.get("attention.head_count"), said.get("embedding_length")
    one_head = said.get("attention.key_length", said.get("rope.dimension_count"))
    if isinstance(heads, int) and isinstance(width, int) and heads and one_head is None:
        one_head = width // heads
    context = said.get("context_length")
    holds = {
        "attention.key_length": lambda value: value in (said.get("rope.dimension_count", value), one_head),
        "attention.value_length": lambda value: value == one_head,
        "attention.sliding_window": lambda value: isinstance(context, int) and (value or context) >= context,
        "rope.scaling.type": lambda value: value == "none",
        "rope.scaling.factor": lambda value: value in (0, 1) or said.get("rope.scaling.type") == "none",
        "rope.scaling.original_context_length": lambda value: said.get("rope.scaling.type") in (None, "none"),
        "rope.scaling.finetuned": lambda value: True,
        "expert_count": lambda value: value == 0,
        "expert_used_count": lambda value: value == 0,
        "tensor_data_layout": lambda value: True,
        "vocab_size": lambda value: True,
    }
    if "logit_softcapping" not in "".join(header.dropped):  # those that are transformers' own defaults
        holds |= {f"{name}_logit_softcapping": lambda value: True for name in ("attn", "final")}
    return [
        f"{header.architecture}.{name}"
        for name, value in said.items()
        if name not in read and not (name in holds and holds[name](value))
    ]


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._tensors: list[str] = []
        self._at = 4

    def header(self) -> GGUFHeader:
        version = self._scalar("I")
        if version not in (2, 3):
            raise struct.error(f"version {version}")
        n_tensors, n_keys = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._string()
            metadata[key] = self._value(self._scalar("I"))
        end = max((self._tensor_end() for _ in range(n_tensors)), default=0)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise InputError(f"model file {self._path}: general.alignment is {alignment!r}: download it again")
        start = math.ceil(self._at / alignment) * alignment
        architecture = str(metadata.get("general.architecture", ""))
        adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", False))
        dropped = _dropped(architecture, metadata, self._tensors)
        self._check_layers(metadata.get(f"{architecture}.block_count"))
        tensors = tuple(self._tensors)
        return GGUFHeader(architecture, frozenset(metadata), start + end, adds_bos, dropped, tensors, metadata)

    def _check_layers(self, said: Any) -> None:
        """Tensors of layers beyond ``block_count`` would be dropped without a word."""
        layers = {int(match[1]) for name in self._tensors if (match := re.match(r"blk\.(\d+)\.", name))}
        if layers and (not isinstance(said, int) or said != max(layers) + 1):
            raise InputError(
                f"model file {self._path}: block_count is {said}, its tensors are of {max(layers) + 1} layers: "
                "get the whole model again"
            )

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        if self._at + length > len(self._data):
            raise IndexError(length)
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Any:
        """A scalar or a string; None for an array, which is only skipped."""
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(self._code(kind))
        item, length = self._scalar("I"), self._scalar("Q")
        if item in (_STRING, _ARRAY):
            for _ in range(length):
                self._value(item)
        else:
            self._at += length * struct.calcsize("<" + self._code(item))
        return None

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise struct.error(f"type {kind}")
        return _SCALARS[kind]

    def _tensor_end(self) -> int:
        """Last byte of a tensor, counted from the start of the data."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # late: 0.4 s

        self._tensors.append(self._string())
        shape = [self._scalar("Q") for _ in range(self._scalar("I"))]
        kind, offset = self._scalar("I"), self._scalar("Q")
        if kind not in iter(GGMLQuantizationType):
            raise struct.error(f"tensor type {kind}")
        block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        return int(offset + math.prod(shape) // block * n_bytes)
