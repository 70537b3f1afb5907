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
# Tokens that one document gives at a time. Many documents matter more than long ones: with 4096 tokens in pieces of
# 256, five documents are held out, and what they realise is off by as much as .007.
_PIECE = 64
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
    documents = calibration.documents()
    random.Random(seed).shuffle(documents)
    held_out = documents[::_HELD_OUT_EVERY]
    rest = [text for index, text in enumerate(documents) if index % _HELD_OUT_EVERY]
    n_held_out = max(1, calibration.max_tokens // _HELD_OUT_EVERY)
    windows = Windows(
        _take(rest, tokenizer, calibration.max_tokens - n_held_out), _take(held_out, tokenizer, n_held_out)
    )
    if not windows.fit or not windows.held_out:
        raise InputError(f"calibration {calibration.source}: no tokens to fit or to check on")
    return windows


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
