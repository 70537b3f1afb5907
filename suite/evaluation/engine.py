"""Batched scoring of token sequences by a causal LM with a sparse scope; the one place that runs forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax

from suite.errors import CellError
from suite.modeling.attach import Attached

Scope = Literal["paper", "scored", "all"]
# A batch holds at most this many positions, so that activations of long documents stay small.
MAX_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
# Logits are reduced this many elements at a time: 2**28 fp32 values are 1 GiB.
MAX_LOGITS = {"cpu": 1 << 25, "cuda": 1 << 28}


@dataclass(frozen=True)
class Request:
    """Tokens to run and the targets scored at their end.

    ``tokens[i]`` is the model's input; ``targets`` are predicted by the last ``len(targets)`` inputs. ``document`` and
    ``offset`` (position of the first token in the document) key the random method's noise.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    document: int
    offset: int = 0

    def first_sparse(self, scope: Scope) -> int:
        """Index of the first input in scope (PROTOCOL: ``scored`` = n_inputs - n_targets, ``paper`` one later)."""
        start = {"all": 0, "scored": len(self.tokens) - len(self.targets)}
        return start.get(scope, len(self.tokens) - len(self.targets) + 1)


@dataclass(frozen=True)
class Score:
    """Scores of one request: summed log-likelihood, whether every target is the argmax, and how much was sparse.

    ``kl`` and ``agree`` (sums over the scored tokens) are set only where a dense reference was given.
    """

    loglikelihood: float
    greedy: bool
    n_scored: int
    n_sparse: int
    kl: float | None = None
    agree: int | None = None


@contextmanager
def _gathered_head(model: Any) -> Iterator[dict[str, Tensor]]:
    """Let the LM head see only the positions in ``rows``, ``columns``: with 49k words the head is 1/5 of SmolLM2."""
    picked: dict[str, Tensor] = {}

    def gather(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        picked["hidden"] = args[0][picked["rows"], picked["columns"]]
        return (picked["hidden"][None],)

    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield picked
    finally:
        handle.remove()


def _logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits of final hidden states (n, d_model), as the model's own forward pass makes them."""
    head = model.get_output_embeddings()
    logits = linear(hidden, head.weight, head.bias)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def batches(requests: Sequence[Request], batch_size: int, max_tokens: int) -> Iterator[list[int]]:
    """Indices of requests in batches of like length, longest first (lm-eval's order, so that batches are the same)."""
    order = sorted(
        range(len(requests)), key=lambda i: (-len(requests[i].tokens), requests[i].tokens, requests[i].targets)
    )
    while order:
        size = max(1, min(batch_size, max_tokens // len(requests[order[0]].tokens)))
        yield order[:size]
        order = order[size:]


class Scorer:
    """Scores requests with one model; keeps the dense final hidden states that KL and agreement are measured against.

    Parameters
    ----------
    model : transformers causal LM
    batch_size : most sequences in a batch
    pad_token : any token id; padding is on the right, where a causal model never looks
    """

    def __init__(self, model: Any, *, batch_size: int, pad_token: int = 0) -> None:
        self.model = model
        self.batch_size = batch_size
        self.pad_token = pad_token
        self.device = next(model.parameters()).device
        self._max_logits = MAX_LOGITS[self.device.type]

    @torch.inference_mode()
    def score(
        self,
        requests: Sequence[Request],
        attached: Attached | None,
        scope: Scope,
        *,
        reference: list[Tensor] | None = None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> list[Score]:
        """Score every request; with ``reference`` (from ``dense_hidden``) also KL(dense || this) and top-1 agreement.

        Requests with equal inputs (one-token choices of a document) share one forward pass.
        """
        twins: dict[tuple[tuple[int, ...], int, int], list[int]] = {}
        for i, request in enumerate(requests):
            twins.setdefault((request.tokens, len(request.targets), request.document), []).append(i)
        groups = list(twins.values())
        scores: dict[int, Score] = {}
        for batch, picked, logits in self._forward([requests[group[0]] for group in groups], attached, scope):
            for group, (start, end) in zip((groups[i] for i in batch), picked["part"].tolist(), strict=True):
                for i in group:
                    dense = None if reference is None else reference[i]
                    scores[i] = self._reduce(requests[i], logits[start:end], attached, scope, dense)
                advance(len(group))
        return [scores[i] for i in range(len(requests))]

    @torch.inference_mode()
    def dense_hidden(self, requests: Sequence[Request]) -> list[Tensor]:
        """Final hidden states (n_targets, d_model) of each request's scored positions; run it with nothing attached."""
        hidden: dict[int, Tensor] = {}
        for batch, picked, _ in self._forward(requests, None, "all"):
            for i, (start, end) in zip(batch, picked["part"].tolist(), strict=True):
                hidden[i] = picked["hidden"][start:end].clone()
        return [hidden[i] for i in range(len(requests))]

    def _forward(
        self, requests: Sequence[Request], attached: Attached | None, scope: Scope
    ) -> Iterator[tuple[list[int], dict[str, Tensor], Tensor]]:
        """Yield (indices, picked, logits); logits (n_scored in batch, vocabulary), ``picked["part"]`` their bounds."""
        with _gathered_head(self.model) as picked:
            for batch in batches(requests, self.batch_size, MAX_BATCH_TOKENS[self.device.type]):
                chosen = [requests[i] for i in batch]
                width = len(chosen[0].tokens)
                ids = torch.tensor([[*r.tokens, *[self.pad_token] * (width - len(r.tokens))] for r in chosen])
                ends = torch.tensor([len(r.tokens) for r in chosen])
                counts = torch.tensor([len(r.targets) for r in chosen])
                rows, columns = _ranges(ends - counts, ends)
                picked.update(rows=rows.to(self.device), columns=columns.to(self.device))
                bounds = torch.cumsum(counts, 0)
                picked["part"] = torch.stack([bounds - counts, bounds], 1)
                if attached is None:
                    logits = self.model(input_ids=ids.to(self.device), use_cache=False).logits[0]
                else:
                    starts = torch.tensor([r.first_sparse(scope) for r in chosen])
                    rows, columns = _ranges(starts, ends)
                    documents = torch.tensor([r.document for r in chosen])[rows]
                    positions = columns + torch.tensor([r.offset for r in chosen])[rows]
                    with attached.positions(rows, columns, documents, positions):
                        logits = self.model(input_ids=ids.to(self.device), use_cache=False).logits[0]
                yield batch, picked, logits

    def _reduce(
        self, request: Request, logits: Tensor, attached: Attached | None, scope: Scope, reference: Tensor | None
    ) -> Score:
        n_scored = len(request.targets)
        targets = torch.tensor(request.targets, device=logits.device)
        total, greedy, kl, agree = 0.0, True, 0.0, 0
        step = max(1, self._max_logits // logits.shape[-1])
        for start in range(0, n_scored, step):
            part = slice(start, start + step)
            log_probs = log_softmax(logits[part], dim=-1, dtype=torch.float32)
            total += float(log_probs.gather(1, targets[part, None]).sum())
            best = log_probs.argmax(-1)
            greedy = greedy and bool((best == targets[part]).all())
            if reference is not None:
                dense = log_softmax(_logits(self.model, reference[part]), dim=-1, dtype=torch.float32)
                kl += float((dense.exp() * (dense - log_probs)).sum())
                agree += int((dense.argmax(-1) == best).sum())
        if total != total or total in (float("inf"), float("-inf")):
            raise CellError(
                f"log-likelihood of document {request.document} is {total}: the model's logits are not finite"
            )
        first = len(request.tokens) if attached is None else request.first_sparse(scope)
        n_sparse = min(n_scored, len(request.tokens) - first)
        scored = (total, greedy, n_scored, n_sparse)
        return Score(*scored) if reference is None else Score(*scored, kl=kl, agree=agree)


def _ranges(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the half-open ranges [starts[i], ends[i]) of each row i, row by row."""
    lengths = ends - starts
    rows = torch.repeat_interleave(torch.arange(len(starts)), lengths)
    before = torch.cumsum(lengths, 0) - lengths
    return rows, torch.arange(int(lengths.sum())) - before[rows] + starts[rows]
