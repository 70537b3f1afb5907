"""decode_perplexity: perplexity as generation sees it, with KL and top-1 agreement to dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from suite.data_files import read_documents
from suite.errors import InputError
from suite.evaluation.engine import Score
from suite.evaluation.plan import Plan, Request
from suite.evaluation.tasks import DECODE_PERPLEXITY, TaskSpec

VERSION = "1"
MIN_WINDOW = 4  # a shorter rest of a document has no second half worth scoring


def windows(tokens: list[int], prefix: list[int], window: int, split: float, document: int) -> Iterator[Request]:
    """Cut one document into windows of at most ``window`` tokens: the first ``split`` of each is dense and unscored.

    Under scope ``scored`` the first sparse position is the last of the first part.

    Parameters
    ----------
    tokens : the document without special tokens
    prefix : tokens put before each window (the BOS token of models that expect one)
    """
    size = window - len(prefix)
    for start in range(0, len(tokens), size):
        ids = (*prefix, *tokens[start : start + size])
        if len(ids) - len(prefix) >= MIN_WINDOW:
            first_scored = max(1, int(len(ids) * split))
            yield Request(ids[:-1], ids[first_scored:], document, start)


class BuiltText:
    """A text cut into windows, with the dense reference that KL and agreement are measured against.

    Parameters
    ----------
    encode : text to token ids without special tokens
    prefix : tokens before each window
    max_length : the model's context in tokens; longer windows are cut to it
    documents : indices of the documents to run, given their number
    """

    version = VERSION
    num_fewshot = 0
    fewshot_split = None

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encode: Callable[[str], list[int]],
        prefix: list[int],
        max_length: int,
        documents: Callable[[int], list[int]],
    ) -> None:
        self.spec = spec
        path, field = spec.files["test"], spec.options["field"]
        rows = read_documents(path, field)
        size = min(spec.options["window"], max_length)
        requests: list[Request] = []
        for i in documents(len(rows)):
            requests += windows(encode(rows[i][field]), prefix, size, spec.options["split"], i)
        if not requests:
            raise InputError(f"{path}: no document of at least {MIN_WINDOW} tokens for {DECODE_PERPLEXITY}")
        self.plan = Plan(requests)
        self.reference: list[torch.Tensor] | None = None

    def values(self, scores: list[Score]) -> dict[tuple[str, str], list[tuple[str, float, float | None]]]:
        """Per metric the documents' (doc_id, value, weight): sums over the document's scored tokens."""
        sums: dict[int, list[float]] = {}
        for request, score in zip(self.plan.requests, scores, strict=True):
            total = sums.setdefault(request.document, [0.0, 0.0, 0.0, 0.0])
            parts: tuple[Any, ...] = (-score.loglikelihood, score.kl or 0.0, score.agree or 0, score.n_scored)
            for i, part in enumerate(parts):
                total[i] += part
        names = ("perplexity", "kl_dense", "top1_agreement")
        return {(name, "none"): [(str(d), s[i], s[3]) for d, s in sorted(sums.items())] for i, name in enumerate(names)}
