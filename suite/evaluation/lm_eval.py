"""lm-eval's Hugging Face model over the suite's scorer."""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval import utils as lm_eval_utils
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from suite.errors import CellError
from suite.evaluation.engine import Score, Scorer
from suite.evaluation.plan import Plan, Request, Scope
from suite.modeling.attach import Attached
from suite.modeling.loading import LoadedModel

logging.getLogger("lm_eval").setLevel(logging.ERROR)


class SuiteLM(HFLM):
    """lm-eval's Hugging Face model with its tokenisation and truncation, scored through ``Scorer`` in a sparse scope.

    ``bind`` sets what the next requests run with; ``scored`` and ``sparse`` count positions since then.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int, seed: int = 0) -> None:
        self.loaded, self.seed = loaded, seed  # the seed of what a task samples
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
        self.scorer = Scorer(loaded.model, batch_size=batch_size)
        self._encoded: dict[tuple[str, bool | None], list[int]] = {}
        self.bind(None, "all", [], {})

    def bind(
        self,
        attached: Attached | None,
        scope: Scope,
        documents: Sequence[int],
        plans: dict[str, Plan],
        window: int | None = None,
    ) -> None:
        """Use ``attached`` in ``scope``.

        Parameters
        ----------
        documents : index in its split of each ``doc_id``
        plans : the task's tokenised requests by their kind, kept by the task from one setting to the next
        window : most tokens of a window of rolling log-likelihoods, as lm-eval's ``max_length``; None: the model's context
        """
        self.window = min(window or self.max_length, self.max_length)
        self.attached, self.scope, self.documents, self.plans = attached, scope, documents, plans
        self.scored = self.sparse = 0
        self._order: list[tuple[int, int]] = []  # document and choice of each request

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, *args: Any, **kwargs: Any) -> list[int]:
        """HFLM's encoding, each string once for all settings of a model."""
        if args or kwargs:
            return super().tok_encode(string, add_special_tokens, *args, **kwargs)
        key = (string, add_special_tokens)
        if key not in self._encoded:
            self._encoded[key] = super().tok_encode(string, add_special_tokens)
        return self._encoded[key]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        if "loglikelihood" not in self.plans:
            self._order = [(self.documents[request.doc_id], request.idx) for request in requests]
            for place, request in zip(self._order, requests, strict=True):
                context, continuation = request.args
                if not context and not self.tok_encode(continuation, add_special_tokens=False):
                    raise _without_target(place, context, continuation)
            super().loglikelihood(requests, disable_tqdm=True)
        scores = self._score(self.plans["loglikelihood"], self.scope)
        return [(score.loglikelihood, score.greedy) for score in scores]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Where HFLM would score what it has tokenised: make the plan that `loglikelihood` scores."""
        scorable = []
        for (document, choice), (texts, context, continuation) in zip(self._order, requests, strict=True):
            if not continuation:
                raise _without_target((document, choice), *texts)
            if not context:
                raise CellError(
                    f"document {document}: choice {choice} {texts[1][:40]!r} follows the context {texts[0][-40:]!r}, "
                    "which has no token of its own: the tokenizer adds no BOS, and the blanks go to the choice; give "
                    "the task a doc_to_text that is empty or has words"
                )
            if len(continuation) > self.max_length:
                raise CellError(
                    f"continuation of document {document} has {len(continuation)} tokens, over {self.max_length}"
                )
            tokens = (*context, *continuation)[-(self.max_length + 1) :]
            scorable.append(Request(tokens[:-1], tuple(continuation), document))
        self.plans["loglikelihood"] = Plan(scorable)
        return []

    def _score(self, plan: Plan, scope: Scope) -> list[Score]:
        scores = self.scorer.score(plan, self.attached, scope)
        self.scored += sum(score.n_scored for score in scores)
        self.sparse += sum(score.n_sparse for score in scores)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole documents over disjoint windows; every position is in scope."""
        if "loglikelihood_rolling" not in self.plans:
            self.plans["loglikelihood_rolling"] = Plan([w for request in requests for w in self._windows(request)])
        plan = self.plans["loglikelihood_rolling"]
        totals: dict[int, float] = defaultdict(float)
        for window, score in zip(plan.requests, self._score(plan, "all"), strict=True):
            totals[window.document] += score.loglikelihood
        return [totals[self.documents[request.doc_id]] for request in requests]

    def _windows(self, request: Instance) -> Iterator[Request]:
        """Disjoint windows of a whole document, in which the BOS token is context and never a target.

        HFLM differs where the tokenizer adds a BOS: it scores it in the first window, after another BOS.
        """
        offset = 0
        tokens = self.tok_encode(request.args[0])
        for window in lm_eval_utils.get_rolling_token_windows(
            token_list=tokens[1:] if tokens[:1] == [self.prefix_token_id] else tokens,
            prefix_token=self.prefix_token_id,
            max_seq_len=self.window,
            context_len=1,
        ):
            context, continuation = lm_eval_utils.make_disjoint_window(window)
            yield Request((*context, *continuation)[:-1], tuple(continuation), self.documents[request.doc_id], offset)
            offset += len(continuation)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Generation; the scope rules of ``attach`` decide which positions are sparse.

        What is sampled is sampled alone, with a seed of its own: neither the batch nor what ran before changes it.
        """
        groups: dict[str, list[int]] = defaultdict(list)
        repeats: dict[int, int] = defaultdict(int)
        texts: dict[int, str] = {}
        for i, request in enumerate(requests):
            if not normalize_gen_kwargs(request.args[1], self.max_gen_toks).get("do_sample"):
                groups[repr(request.args[1])].append(i)
                continue
            document = self.documents[request.doc_id]
            with _seeded(self.device, self.seed, document, request.idx, repeats[id(request)]):
                (texts[i],) = self._generate([request])
            repeats[id(request)] += 1
        for group in groups.values():
            group.sort(key=lambda i: (-len(self.tok_encode(requests[i].args[0])), requests[i].args[0]))
            size = self.scorer.batch_size  # 1 where the positions depend on the length of the batch
            for start in range(0, len(group), size):
                batch = group[start : start + size]
                texts |= zip(batch, self._generate([requests[i] for i in batch]), strict=True)
        return [texts[i] for i in range(len(requests))]

    def _generate(self, requests: Sequence[Instance]) -> list[str]:
        options = normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(options.pop("until", None), eos=eos)
        n_new = options.pop("max_gen_toks")
        if n_new >= self.max_length:
            raise CellError(
                f"max_gen_toks {n_new} leaves no room for a prompt: the model's context is {self.max_length}"
            )
        ids, mask = self.tok_batch_encode([r.args[0] for r in requests], left_truncate_len=self.max_length - n_new)
        documents = torch.tensor([self.documents[r.doc_id] for r in requests])
        self._check_options(options)
        named = contextlib.nullcontext() if self.attached is None else self.attached.documents(documents)
        with named, torch.inference_mode():
            try:
                output = self._model_generate(
                    context=ids.to(self.device),
                    attention_mask=mask.to(self.device),
                    stop=until,
                    max_length=ids.shape[1] + n_new,
                    **options,
                )
            except (TypeError, ValueError) as error:
                reason = next(iter(str(error).splitlines()), "")
                raise CellError(f"generation_kwargs {requests[0].args[1]}: {reason}") from error
        answers = output[:, ids.shape[1] :].tolist()
        self._count_generated(answers)
        decoded = (self.tok_decode(answer) for answer in answers)
        return [postprocess_generated_text(generation=text, stop=until, think_end_token=None) for text in decoded]

    @staticmethod
    def _check_options(options: Mapping[str, Any]) -> None:
        """Refuse what makes several rows of a prompt: realised sparsity and documents are counted by row."""
        for option in ("num_beams", "num_return_sequences"):
            if options.get(option, 1) != 1:
                raise CellError(f"generation_kwargs {option} {options[option]}: must be 1; beams are not supported")

    def _count_generated(self, answers: list[list[int]]) -> None:
        """Count generated tokens; with scope ``paper`` the first of each comes from the dense prefill."""
        for answer in answers:
            n_tokens = len(answer)
            while n_tokens > 1 and answer[n_tokens - 1] == self.tokenizer.pad_token_id:
                n_tokens -= 1
            self.scored += n_tokens
            self.sparse += 0 if self.attached is None else n_tokens - (self.scope == "paper")


@contextlib.contextmanager
def _seeded(device: torch.device, *parts: int) -> Iterator[None]:
    """Random numbers of torch decided by ``parts`` alone; those of the caller go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))
        yield


def _without_target(place: tuple[int, int], context: str, continuation: str) -> CellError:
    """A continuation without a token of its own would have log-likelihood 0 and win against every other."""
    document, choice = place
    return CellError(
        f"document {document}: choice {choice} {continuation[:40]!r} has no token of its own after "
        f"{context[-40:]!r}: the tokenizer merges it into the context; give the task a target_delimiter"
    )
