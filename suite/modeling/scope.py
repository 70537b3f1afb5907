"""Which tokens of a forward pass are sparse."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from suite.errors import InputError

Scope = Literal["all", "paper", "scored"]
SCOPES: tuple[Scope, ...] = ("all", "paper", "scored")


@dataclass(frozen=True)
class Explicit:
    """Tokens named by the caller, one entry a token, int64: batch row, column, document and position in it."""

    rows: Tensor
    columns: Tensor
    documents: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Tokens:
    """Tokens in scope of one forward pass over ``batch * width`` tokens.

    Parameters
    ----------
    index : slice or Tensor, shape (n_tokens,), int64
        Into the tokens laid out row by row; a slice where they are one run, because a view is cheaper than a gather.
    documents, positions : Tensor, shape (n_tokens,), int64
        Keys of each token's noise.
    alive : Tensor, shape (n_tokens,), bool, or None
        Those that really are in scope, where leaving out the others would make the host wait for the device.
    total : int
        ``batch * width``.
    step : bool
        A decode step: one token a row.
    """

    index: slice | Tensor
    documents: Tensor
    positions: Tensor
    alive: Tensor | None
    total: int
    step: bool = False


@dataclass(frozen=True)
class Prompt:
    """Tokens of the prompts in one forward pass.

    Parameters
    ----------
    tokens : Tensor, shape (batch, width), bool
        Those before the first token in scope of their row, padding left out.
    begins : bool
        Whether the pass has no past: its rows begin here.
    """

    tokens: Tensor
    begins: bool


class ScopeRule:
    """Derives the tokens in scope from the arguments of the model's forward pass."""

    def __init__(self, model: nn.Module, scope: Scope) -> None:
        self._scope = scope
        self._names = list(inspect.signature(model.forward).parameters)
        self._ends = _end_tokens(model)

    def tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any], explicit: Explicit | None) -> Tokens | None:
        """Tokens in scope of this forward pass; None if there are none."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        ids = given.get("input_ids")
        shaped = ids if ids is not None else given.get("inputs_embeds")
        if shaped is None:
            raise InputError("attach cannot see the tokens: call the model with input_ids or inputs_embeds")
        batch, width = int(shaped.shape[0]), int(shaped.shape[1])
        if explicit is not None:
            return _explicit_tokens(explicit, batch, width, shaped.device)
        past = _past_length(given.get("past_key_values"), width)
        decoding = past is None or past > 0
        if self._scope == "paper" and not decoding:
            return None
        valid = _valid(given.get("attention_mask"), past, width)
        positions = _positions(given, valid, past, batch, width, shaped.device)
        if decoding and width == 1:
            alive = None if ids is None or self._ends is None else ~torch.isin(ids, self._ends.to(ids.device))
            return _every_token(positions, batch, width, None if alive is None else alive.flatten())
        if self._scope == "scored" and not decoding:
            valid = _last_only(valid, batch, width, shaped.device)
        if valid is None:
            return _every_token(positions, batch, width, None)
        rows, columns = valid.nonzero(as_tuple=True)  # the host waits here, once for a prefill with padding
        return _explicit_tokens(Explicit(rows, columns, rows, positions[rows, columns]), batch, width, shaped.device)

    def prompt(self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tokens | None) -> Prompt | None:
        """Tokens of the prompts in this forward pass, with its tokens in scope; None where it holds none.

        Raises
        ------
        InputError
            A token is in scope in a row that has no prompt.
        """
        if tokens is not None and tokens.step:
            return None
        given = dict(zip(self._names, args, strict=False)) | kwargs
        ids = given.get("input_ids")
        shaped = given["inputs_embeds"] if ids is None else ids
        batch, width = int(shaped.shape[0]), int(shaped.shape[1])
        past = _past_length(given.get("past_key_values"), width)
        first = torch.full((batch,), width, device=shaped.device)
        if tokens is not None:
            places = torch.arange(batch * width, device=shaped.device)[tokens.index]
            first.scatter_reduce_(0, places // width, places % width, "amin")
        before = torch.arange(width, device=shaped.device) < first[:, None]
        valid = _valid(given.get("attention_mask"), past, width)
        before = before if valid is None else before & valid
        if past == 0 and bool((~before.any(1) & (first < width)).any()):
            raise InputError(
                "a sequence has no token before its first sparse one, its prompt: use scope paper or scored"
            )
        return Prompt(before, begins=past == 0)


def _end_tokens(model: nn.Module) -> Tensor | None:
    """Ids that a row of a batch is fed once it has finished: its end token, then padding."""
    ids: set[int] = set()
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(holder, name, None)
            ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return torch.tensor(sorted(ids)) if ids else None


def _past_length(cache: Any, width: int) -> int | None:
    """Tokens in the key-value cache before this pass; None for "some" where asking would make the host wait."""
    if cache is None:
        return 0
    length = cache.get_seq_length()
    if isinstance(length, Tensor) and length.device.type != "cpu" and width == 1:
        return None
    return int(length)


def _valid(mask: Any, past: int | None, width: int) -> Tensor | None:
    """Which tokens of this pass are not padding, shape (batch, width), bool; None for all."""
    if isinstance(mask, Mapping):  # one mask for each kind of attention layer
        mask = next(iter(mask.values()))
    if mask is None or width == 1:
        return None
    if mask.ndim == 2:
        return mask[:, -width:].bool()
    # (batch, 1, width, keys) as generate() makes it for a static cache: a token that is not padding sees itself
    start = past or 0
    seen = torch.diagonal(mask[:, 0, :, start : start + width], dim1=-2, dim2=-1)
    return seen if seen.dtype == torch.bool else seen == 0


def _positions(
    given: Mapping[str, Any], valid: Tensor | None, past: int | None, batch: int, width: int, device: torch.device
) -> Tensor:
    """Position of every token in its row without padding, shape (batch, width)."""
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if positions is not None:
        return positions.expand(batch, -1)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(-1) - 1)[:, -width:]
    if valid is not None:
        return valid.long().cumsum(-1) - 1 + (past or 0)
    start = given["past_key_values"].get_seq_length() if past is None else past
    return (torch.arange(width, device=device) + start).expand(batch, -1)


def _last_only(valid: Tensor | None, batch: int, width: int, device: torch.device) -> Tensor:
    """The last token of each row that is not padding."""
    if valid is None:
        valid = torch.ones(batch, width, dtype=torch.bool, device=device)
    after = valid.flip(-1).long().cumsum(-1).flip(-1)
    return valid & (after == 1)


def _every_token(positions: Tensor, batch: int, width: int, alive: Tensor | None) -> Tokens:
    total = batch * width
    documents = torch.arange(batch, device=positions.device).repeat_interleave(width, output_size=total)
    return Tokens(slice(0, total), documents, positions.reshape(-1), alive, total, step=width == 1)


def _explicit_tokens(tokens: Explicit, batch: int, width: int, device: torch.device) -> Tokens | None:
    n_tokens = len(tokens.rows)
    if n_tokens == 0:
        return None
    flat = tokens.rows * width + tokens.columns
    index: slice | Tensor = flat.to(device)
    if flat.device.type == "cpu":
        inside = (tokens.columns >= 0) & (tokens.columns < width) & (tokens.rows >= 0) & (tokens.rows < batch)
        if not inside.all():
            bad = int((~inside).nonzero()[0])
            place = f"row {int(tokens.rows[bad])}, column {int(tokens.columns[bad])}"
            raise InputError(f"token in scope at {place} lies outside the batch of {batch} x {width} tokens")
        if bool((flat.diff() == 1).all()):
            index = slice(int(flat[0]), int(flat[0]) + n_tokens)
    return Tokens(index, tokens.documents.to(device), tokens.positions.to(device), None, batch * width)
