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


_PREDICTOR_WINDOW = 512  # tokens, and of one document at a time: contexts as long as those it will work in
_MOST_HELD_OUT = 16384  # tokens: a quantile of 16384 tokens is known to .001


@dataclass(frozen=True)
class Windows:
    """Token windows to fit on and to check on; no document is in both."""

    fit: list[list[int]]
    held_out: list[list[int]]


@dataclass(frozen=True)
class PredictorWindows:
    """Token windows to train a predictor on, to set its thresholds on and to check it on; no document is in two."""

    train: list[list[int]]
    thresholds: list[list[int]]
    check: list[list[int]]


def make_windows(calibration: Calibration, tokenizer: Any, seed: int) -> Windows:
    """Pieces of shuffled documents, the first pieces of all documents first, packed into windows of 256 tokens.

    Raises
    ------
    InputError
        The text gives no token to fit or to check on.
    """
    (held_out,), rest = _split(calibration.documents(), random.Random(seed), 1)
    n_held_out = max(1, calibration.max_tokens // _HELD_OUT_EVERY)
    take = _Taker(calibration, tokenizer, _PIECE, WINDOW)
    return Windows(take(rest, calibration.max_tokens - n_held_out), take(held_out, n_held_out))


def make_predictor_windows(calibration: Calibration, tokenizer: Any, seed: int) -> PredictorWindows:
    """As `make_windows`, in windows and pieces of 512 tokens, and with an eighth, at most 16384 tokens, in each held-out part.

    Raises
    ------
    InputError
        The text gives no token for one of the parts.
    """
    (thresholds, check), train = _split(calibration.documents(), random.Random(seed), 2)
    n_held_out = max(1, min(_MOST_HELD_OUT, calibration.max_tokens // 8))
    take = _Taker(calibration, tokenizer, _PREDICTOR_WINDOW, _PREDICTOR_WINDOW)
    n_train = calibration.max_tokens - 2 * n_held_out
    return PredictorWindows(take(train, n_train), take(thresholds, n_held_out), take(check, n_held_out))


def _split(documents: Sequence[str], rng: random.Random, n_parts: int) -> tuple[list[list[str]], list[str]]:
    """Parts of held-out documents and the rest, each shuffled.

    Of every four documents a part that are alike in their share of letters one is held out: drawn from all of them,
    what they realise is off by up to .007 from text to text.
    """
    order = sorted(range(len(documents)), key=lambda i: _letters(documents[i]))
    every = _HELD_OUT_EVERY * n_parts
    part_of: dict[int, int] = {}
    for start in range(0, len(order), every):
        group = order[start : start + every]
        for part, document in enumerate(rng.sample(group, min(n_parts, len(group)))):
            part_of[document] = part
    shuffled = list(range(len(documents)))
    rng.shuffle(shuffled)
    held_out = [[documents[i] for i in shuffled if part_of.get(i) == part] for part in range(n_parts)]
    return held_out, [documents[i] for i in shuffled if i not in part_of]


def _letters(text: str) -> float:
    return sum(map(str.isalpha, text)) / max(1, len(text))


class _Taker:
    """Takes windows from documents; each begins with what the tokenizer puts before a text.

    Parameters
    ----------
    piece : most tokens that one document gives at a time
    window : most tokens of a window
    """

    def __init__(self, calibration: Calibration, tokenizer: Any, piece: int, window: int) -> None:
        self._source, self._tokenizer, self._piece, self._window = calibration.source, tokenizer, piece, window
        empty = list(map(int, tokenizer("")["input_ids"]))
        first = list(map(int, tokenizer(calibration.documents()[0])["input_ids"]))
        self._prefix = empty if first[: len(empty)] == empty else []  # Gemma is lost without it

    def __call__(self, documents: Sequence[str], n_tokens: int) -> list[list[int]]:
        """Windows of `n_tokens` in all, or of all there are; tokenizes no more documents than that needs."""
        taken: list[int] = []
        rest: list[list[int]] = []
        for text in documents:
            if len(taken) >= n_tokens:
                break
            ids = [int(token) for token in self._tokenizer(text)["input_ids"]][len(self._prefix) :]
            taken += ids[: self._piece]
            rest.append(ids[self._piece :])
        while len(taken) < n_tokens and any(rest):
            taken += [token for ids in rest for token in ids[: self._piece]]
            rest = [ids[self._piece :] for ids in rest]
        taken = taken[:n_tokens]
        width = self._window - len(self._prefix)
        if not taken:
            raise InputError(f"calibration {self._source}: no tokens to fit or to check on; give more documents")
        return [self._prefix + taken[start : start + width] for start in range(0, len(taken), width)]


def batches(windows: Sequence[list[int]], n_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows padded at the right into batches of at most `n_tokens` each.

    Yields
    ------
    input_ids, attention_mask : Tensor, shape (n_windows, width), int64
    """
    per_batch = max(1, n_tokens // max(map(len, windows), default=1))
    for start in range(0, len(windows), per_batch):
        group = windows[start : start + per_batch]
        width = max(len(window) for window in group)
        ids = torch.zeros(len(group), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, window in enumerate(group):
            ids[row, : len(window)] = torch.tensor(window)
            mask[row, : len(window)] = 1
        yield ids, mask
