"""Requests in the order and the batches they run in, prepared once for all settings of a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from suite.evaluation.contexts import Context, DenseContexts

Scope = Literal["paper", "scored", "all"]


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
        """Index of the first input in scope (``scored`` = n_inputs - n_targets, ``paper`` one later)."""
        start = {"all": 0, "scored": self.n_context}
        return start.get(scope, self.n_context + 1)

    @property
    def n_context(self) -> int:
        """Inputs before the first scored one: dense in scopes ``scored`` and ``paper``."""
        return len(self.tokens) - len(self.targets)

    @property
    def context(self) -> Context:
        """Those inputs."""
        return self.tokens[: self.n_context]


@dataclass
class Segment:
    """Requests whose dense contexts are in memory together, their batches, and the contexts once they are computed."""

    contexts: list[Context]
    batches: list[list[int]]
    states: DenseContexts | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of the contexts."""
        return sum(map(len, self.contexts))


@dataclass
class Plan:
    """Requests of a task, those with equal inputs grouped (one-token choices of a document): one forward pass a group.

    ``segments`` is made by the scorer that first runs the plan.
    """

    requests: Sequence[Request]
    groups: list[list[int]] = field(init=False)
    segments: list[Segment] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        twins: dict[tuple[tuple[int, ...], int, int], list[int]] = {}
        for i, request in enumerate(self.requests):
            twins.setdefault((request.tokens, len(request.targets), request.document), []).append(i)
        self.groups = list(twins.values())

    @property
    def distinct(self) -> list[Request]:
        """First request of every group."""
        return [self.requests[group[0]] for group in self.groups]


def batches(requests: Sequence[Request], batch_size: int, max_tokens: int) -> Iterator[list[int]]:
    """Indices of requests in batches of like length, longest first (lm-eval's order, so that batches are the same)."""
    order = sorted(
        range(len(requests)), key=lambda i: (-len(requests[i].tokens), requests[i].tokens, requests[i].targets)
    )
    while order:
        size = max(1, min(batch_size, max_tokens // len(requests[order[0]].tokens)))
        yield order[:size]
        order = order[size:]


def make_segments(requests: Sequence[Request], *, max_segment: int, max_tokens: int, max_columns: int) -> list[Segment]:
    """Cut requests, in their order, where their distinct contexts would pass ``max_segment`` tokens; batch each part.

    Parameters
    ----------
    max_tokens : positions of continuations in a batch, padding included
    max_columns : the same with their contexts: what attention works on
    """
    segments: list[Segment] = []
    members: list[int] = []
    contexts: dict[Context, None] = {}
    n_tokens = 0
    for i, request in enumerate(requests):
        new = 0 if request.context in contexts else request.n_context
        if members and n_tokens + new > max_segment:
            segments.append(_segment(requests, members, contexts, max_tokens, max_columns))
            members, contexts, n_tokens = [], {}, 0
            new = request.n_context
        members.append(i)
        if request.n_context:
            contexts[request.context] = None
        n_tokens += new
    if members:
        segments.append(_segment(requests, members, contexts, max_tokens, max_columns))
    return segments


def _segment(
    requests: Sequence[Request],
    members: Sequence[int],
    contexts: dict[Context, None],
    max_tokens: int,
    max_columns: int,
) -> Segment:
    """Batches of like continuation length, since every position of a continuation costs a whole forward pass."""
    order = sorted(members, key=lambda i: (-len(requests[i].targets), -requests[i].n_context, i))
    found: list[list[int]] = []
    width = deepest = 0
    for i in order:
        n_targets, n_context = len(requests[i].targets), requests[i].n_context
        deepest = max(deepest, n_context)
        size = len(found[-1]) + 1 if found else 1
        if not found or size * width > max_tokens or size * (width + deepest) > max_columns:
            found.append([])
            width, deepest = n_targets, n_context
        found[-1].append(i)
    return Segment(list(contexts), found)
