"""Calibration text as batches of token windows, split by document."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from suite.errors import InputError
from suite.fitting.calibration import Calibration

WINDOW = 256  # tokens
_PIECE = 48  # tokens that one document gives at a time: many documents matter more than long ones
_HELD_OUT_EVERY = 4  # each fourth document, and so a fourth of the tokens


@dataclass(frozen=True)
class Windows:
    """Token windows to fit on and to check on; no document is in both."""

    fit: list[list[int]]
    held_out: list[list[int]]


def make_windows(calibration: Calibration, tokenizer: Any, seed: int) -> Windows:
    """Pieces of shuffled documents, the first pieces of all documents first, packed into windows of 256 tokens.

    Raises
    ------
    InputError
        The text gives no token to fit or to check on.
    """
    held_out, rest = _split(calibration.documents(), random.Random(seed))
    n_held_out = max(1, calibration.max_tokens // _HELD_OUT_EVERY)
    windows = Windows(
        _take(rest, tokenizer, calibration.max_tokens - n_held_out), _take(held_out, tokenizer, n_held_out)
    )
    if not windows.fit or not windows.held_out:
        raise InputError(f"calibration {calibration.source}: no tokens to fit or to check on")
    return windows


def _split(documents: Sequence[str], rng: random.Random) -> tuple[list[str], list[str]]:
    """Held-out documents and the rest, each shuffled.

    Of every four documents that are alike in their share of letters one is held out: drawn from all of them, what
    they realise is off by up to .007 from text to text.
    """
    order = sorted(range(len(documents)), key=lambda i: _letters(documents[i]))
    held_out = set()
    for start in range(0, len(order), _HELD_OUT_EVERY):
        held_out.add(rng.choice(order[start : start + _HELD_OUT_EVERY]))
    shuffled = list(range(len(documents)))
    rng.shuffle(shuffled)
    return [documents[i] for i in shuffled if i in held_out], [documents[i] for i in shuffled if i not in held_out]


def _letters(text: str) -> float:
    return sum(map(str.isalpha, text)) / max(1, len(text))


def _take(documents: Sequence[str], tokenizer: Any, n_tokens: int) -> list[list[int]]:
    """Windows of `n_tokens` in all, or of all there are; tokenizes no more documents than that needs."""
    taken: list[int] = []
    rest: list[list[int]] = []
    for text in documents:
        if len(taken) >= n_tokens:
            break
        ids = [int(token) for token in tokenizer(text)["input_ids"]]
        taken += ids[:_PIECE]
        rest.append(ids[_PIECE:])
    while len(taken) < n_tokens and any(rest):
        taken += [token for ids in rest for token in ids[:_PIECE]]
        rest = [ids[_PIECE:] for ids in rest]
    taken = taken[:n_tokens]
    return [taken[start : start + WINDOW] for start in range(0, len(taken), WINDOW)]


def batches(windows: Sequence[list[int]], n_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows padded at the right into batches of at most `n_tokens` each.

    Yields
    ------
    input_ids, attention_mask : Tensor, shape (n_windows, width), int64
    """
    per_batch = max(1, n_tokens // WINDOW)
    for start in range(0, len(windows), per_batch):
        group = windows[start : start + per_batch]
        width = max(len(window) for window in group)
        ids = torch.zeros(len(group), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, window in enumerate(group):
            ids[row, : len(window)] = torch.tensor(window)
            mask[row, : len(window)] = 1
        yield ids, mask
