"""Batched scoring of token sequences by a causal LM with a sparse scope; the one place that runs forward passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear, log_softmax
from transformers.cache_utils import Cache

from suite.errors import CellError
from suite.evaluation.contexts import DenseContexts, bytes_per_token, can_share_contexts, depends_on_batch
from suite.evaluation.plan import Plan, Request, Scope, Segment, batches, make_segments
from suite.modeling.attach import Attached

FloatArray = NDArray[np.floating[Any]]

# A batch holds at most this many positions, so that activations of long documents stay small ...
MAX_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
# ... this many columns of attention (continuations with their contexts) ...
MAX_COLUMNS = {"cpu": 1 << 15, "cuda": 1 << 18}
# ... and this many logits. They are reduced MAX_LOGITS elements at a time: 2**27 fp32 values are 512 MiB,
# of which KL holds several, and several processes share a GPU.
MAX_BATCH_LOGITS = {"cpu": 1 << 28, "cuda": 1 << 30}
MAX_LOGITS = {"cpu": 1 << 25, "cuda": 1 << 27}
# Contexts kept between settings: this share of the free GPU memory, or 1 GiB of the host's.
CONTEXT_SHARE, CONTEXT_BYTES_CPU = 0.15, 1 << 30
_ROOM_TO_SHARE = 4  # a segment takes at most 1/4 of the budget


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


@dataclass(frozen=True)
class _Scored:
    """Result of one batch: groups in it, their bounds in the rows of ``hidden`` and ``logits``."""

    groups: list[int]
    bounds: list[tuple[int, int]]
    hidden: Tensor
    logits: Tensor


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


class Scorer:
    """Scores requests with one model; keeps the dense contexts of a plan for the settings that follow.

    Parameters
    ----------
    model : transformers causal LM
    batch_size : most sequences in a batch; continuations of shared contexts fill a batch with as many positions;
        1 for a model whose forward pass depends on the batch
    pad_token : any token id; padding is on the right, where a causal model never looks
    share_contexts : compute the dense contexts of scopes ``scored`` and ``paper`` once, where the architecture allows
    """

    def __init__(self, model: Any, *, batch_size: int, pad_token: int = 0, share_contexts: bool = True) -> None:
        self.model = model
        self.batch_size = 1 if depends_on_batch(model) else batch_size
        self.pad_token = pad_token
        self.device = next(model.parameters()).device
        self.shares = share_contexts and can_share_contexts(model)
        kind = self.device.type
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self._max_tokens = min(MAX_BATCH_TOKENS[kind], max(1, MAX_BATCH_LOGITS[kind] // vocabulary))
        self._budget = 0  # in tokens, measured when contexts are first kept
        self._kept: list[Segment] = []

    @torch.inference_mode()
    def score(
        self,
        requests: Plan | Sequence[Request],
        attached: Attached | None,
        scope: Scope,
        *,
        reference: list[Tensor] | None = None,
    ) -> list[Score]:
        """Score every request; with ``reference`` (from ``dense_hidden``) also KL(dense || this) and top-1 agreement.

        Given as the same `Plan` each time, the settings of a task share its dense contexts.
        """
        plan = requests if isinstance(requests, Plan) else Plan(requests)
        if not plan.requests:
            return []
        owners: list[int] = []
        found: list[Tensor] = []
        for batch in self._forward(plan, attached, scope):
            chosen, rows, targets = _tokens_of(plan, batch)
            owners += chosen
            dense = None if reference is None else torch.cat([reference[plan.groups[g][0]] for g in batch.groups])
            found.append(self._token_scores(batch.logits, rows, targets, dense))
        return _sums(plan, owners, torch.cat(found, 1).cpu().numpy(), attached, scope)

    @torch.inference_mode()
    def dense_hidden(self, requests: Plan | Sequence[Request]) -> list[Tensor]:
        """Final hidden states (n_targets, d_model) of each request's scored positions; run it with nothing attached."""
        plan = requests if isinstance(requests, Plan) else Plan(requests)
        hidden: dict[int, Tensor] = {}
        for batch in self._forward(plan, None, "scored"):
            for group, (start, end) in zip(batch.groups, batch.bounds, strict=True):
                hidden |= dict.fromkeys(plan.groups[group], batch.hidden[start:end].clone())
        return [hidden[i] for i in range(len(plan.requests))]

    def _forward(self, plan: Plan, attached: Attached | None, scope: Scope) -> Iterator[_Scored]:
        requests = plan.distinct
        with _gathered_head(self.model) as picked:
            if scope == "all" or not self.shares or (attached is not None and attached.needs_prompt):
                for batch in batches(requests, self.batch_size, self._max_tokens):
                    yield self._run(requests, batch, attached, scope, picked, None)
                return
            for segment in self._segments(plan, requests):
                states = segment.states
                if states is None:
                    states = self._contexts(segment, attached, picked)
                    self._keep(plan, segment, states)
                for batch in segment.batches:
                    yield self._run(requests, batch, attached, scope, picked, states)

    def _run(
        self,
        requests: Sequence[Request],
        batch: list[int],
        attached: Attached | None,
        scope: Scope,
        picked: dict[str, Tensor],
        states: DenseContexts | None,
    ) -> _Scored:
        """One forward pass over whole requests, or over their continuations where the contexts' states are given."""
        chosen = [requests[i] for i in batch]
        cuts = torch.tensor([0 if states is None else r.n_context for r in chosen])
        inputs = [r.tokens[cut:] for r, cut in zip(chosen, cuts.tolist(), strict=True)]
        width = max(map(len, inputs))
        ids = torch.tensor([[*tokens, *[self.pad_token] * (width - len(tokens))] for tokens in inputs])
        ends = torch.tensor([len(tokens) for tokens in inputs])
        counts = torch.tensor([len(r.targets) for r in chosen])
        rows, columns = _ranges(ends - counts, ends)
        picked.update(rows=rows.to(self.device), columns=columns.to(self.device))
        bounds = torch.cumsum(counts, 0)
        past = self._past(chosen, cuts, width, states)
        with nullcontext() if attached is None else _in_scope(attached, chosen, scope, cuts, ends):
            logits = self.model(input_ids=ids.to(self.device), **past).logits[0]
        return _Scored(
            batch, list(zip((bounds - counts).tolist(), bounds.tolist(), strict=True)), picked["hidden"], logits
        )

    def _past(
        self, chosen: Sequence[Request], cuts: Tensor, width: int, states: DenseContexts | None
    ) -> dict[str, Any]:
        """Arguments of the model that put the contexts before the continuations."""
        deepest = int(cuts.max())
        if states is None or deepest == 0:
            return {"use_cache": False}
        mask = torch.arange(deepest + width) >= (deepest - cuts)[:, None]
        return {
            "past_key_values": states.of([r.context for r in chosen], self.device),
            "attention_mask": mask.long().to(self.device),
            "position_ids": (cuts[:, None] + torch.arange(width)).to(self.device),
            "use_cache": True,
        }

    def _segments(self, plan: Plan, requests: Sequence[Request]) -> list[Segment]:
        if plan.segments is None:
            if not self._budget:
                free = CONTEXT_BYTES_CPU
                if self.device.type == "cuda":
                    free = int(CONTEXT_SHARE * torch.cuda.mem_get_info(self.device)[0])
                self._budget = max(_ROOM_TO_SHARE, free // bytes_per_token(self.model))
            longest = max((len(r.tokens) for r in requests), default=1)
            plan.segments = make_segments(
                requests,
                max_segment=self._budget // _ROOM_TO_SHARE,
                max_tokens=min(self._max_tokens, self.batch_size * longest),
                max_columns=min(MAX_COLUMNS[self.device.type], _ROOM_TO_SHARE * self.batch_size * longest),
            )
        return plan.segments

    def _keep(self, plan: Plan, segment: Segment, states: DenseContexts) -> None:
        """Keep contexts for the settings that follow, in place of other plans' but never of this plan's."""
        while self._kept and sum(s.n_tokens for s in self._kept) + segment.n_tokens > self._budget:
            oldest = self._kept[0]
            if any(oldest is own for own in plan.segments or ()):
                return
            self._kept.pop(0).states = None
        segment.states = states
        self._kept.append(segment)

    def _contexts(self, segment: Segment, attached: Attached | None, picked: dict[str, Tensor]) -> DenseContexts:
        """Run the contexts densely, whatever is attached; of the logits only one row is made, and thrown away."""
        nothing = torch.zeros(0, dtype=torch.int64)

        def forward(ids: Tensor, cache: Cache) -> None:
            zero = torch.zeros(1, dtype=torch.int64, device=self.device)
            picked.update(rows=zero, columns=zero)
            with nullcontext() if attached is None else attached.positions(nothing, nothing, nothing, nothing):
                self.model(input_ids=ids.to(self.device), past_key_values=cache, use_cache=True)

        return DenseContexts(segment.contexts, forward, max_tokens=self._max_tokens, pad_token=self.pad_token)

    def _token_scores(self, logits: Tensor, rows: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        """Per scored token: log-likelihood, whether it is the argmax, KL to dense, whether the argmax is dense's.

        Parameters
        ----------
        logits : Tensor, shape (n_rows, vocabulary)
        rows, targets : Tensor, shape (n_tokens,), on the host, rows in ascending order
        reference : Tensor, shape (n_rows, d_model), or None

        Returns
        -------
        Tensor, shape (2 or 4, n_tokens), fp32, on the model's device: the host waits once a call of ``score``, not here.
        """
        step = max(1, MAX_LOGITS[self.device.type] // logits.shape[-1])
        starts = range(0, len(logits), step)
        ends = torch.searchsorted(rows, torch.tensor([start + step for start in starts])).tolist()
        parts, begin = [], 0
        for start, end in zip(starts, ends, strict=True):
            log_probs = log_softmax(logits[start : start + step], dim=-1, dtype=torch.float32)
            best = log_probs.argmax(-1)
            row = (rows[begin:end] - start).to(self.device)
            target = targets[begin:end].to(self.device)
            values = [log_probs[row, target], best[row] == target]
            if reference is not None:
                hidden = reference[start : start + step]
                dense = log_softmax(_logits(self.model, hidden), dim=-1, dtype=torch.float32)
                values += [(dense.exp() * (dense - log_probs)).sum(-1)[row], (dense.argmax(-1) == best)[row]]
            parts.append(torch.stack([value.float() for value in values]))
            begin = end
        return torch.cat(parts, 1)


def _in_scope(attached: Attached, chosen: Sequence[Request], scope: Scope, cuts: Tensor, ends: Tensor) -> Any:
    """Name the sparse tokens of a batch whose first ``cuts`` inputs are not in it."""
    starts = (torch.tensor([r.first_sparse(scope) for r in chosen]) - cuts).minimum(ends)
    rows, columns = _ranges(starts, ends)
    documents = torch.tensor([r.document for r in chosen])[rows]
    positions = columns + (cuts + torch.tensor([r.offset for r in chosen]))[rows]
    return attached.positions(rows, columns, documents, positions)


def _tokens_of(plan: Plan, batch: _Scored) -> tuple[list[int], Tensor, Tensor]:
    """Owner (index of its request), row of the logits, and target of every scored token, in the order of the rows."""
    owners: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    for group, (start, end) in zip(batch.groups, batch.bounds, strict=True):
        for i in plan.groups[group]:
            owners += [i] * (end - start)
            rows += range(start, end)
            targets += plan.requests[i].targets
    row, order = torch.sort(torch.tensor(rows), stable=True)
    return torch.tensor(owners)[order].tolist(), row, torch.tensor(targets)[order]


def _sums(
    plan: Plan, owners: Sequence[int], tokens: FloatArray, attached: Attached | None, scope: Scope
) -> list[Score]:
    """Scores of all requests from the scores (2 or 4, n_tokens) of their tokens, summed in fp64."""
    n_requests = len(plan.requests)
    sums = np.stack([np.bincount(owners, weights=row, minlength=n_requests) for row in tokens.astype(np.float64)], 1)
    scores = []
    for request, (total, hits, *dense) in zip(plan.requests, sums.tolist(), strict=True):
        if not math.isfinite(total):
            raise CellError(
                f"log-likelihood of document {request.document} is {total}: the model's logits are not finite"
            )
        n_scored = len(request.targets)
        first = len(request.tokens) if attached is None else request.first_sparse(scope)
        n_sparse = min(n_scored, len(request.tokens) - first)
        kl, agree = (dense[0], int(dense[1])) if dense else (None, None)
        scores.append(Score(total, hits == n_scored, n_scored, n_sparse, kl, agree))
    return scores


def _ranges(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the half-open ranges [starts[i], ends[i]) of each row i, row by row."""
    lengths = ends - starts
    rows = torch.repeat_interleave(torch.arange(len(starts)), lengths)
    before = torch.cumsum(lengths, 0) - lengths
    return rows, torch.arange(int(lengths.sum())) - before[rows] + starts[rows]
