"""lm-eval's tasks, prompts and metrics over the suite's scorer; with `metrics` the only importer of lm_eval."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval import utils as lm_eval_utils
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from suite.errors import CellError, InputError
from suite.evaluation.chat import request_options
from suite.evaluation.engine import Score, Scorer
from suite.evaluation.metrics import Items, Sample, collect
from suite.evaluation.plan import Plan, Request, Scope
from suite.evaluation.results import WEIGHT
from suite.evaluation.shots import Shots, split_of
from suite.evaluation.tasks import LOCAL_TASKS, PACK_DIR, TaskSpec, builtin_file, lm_eval_tasks_dir
from suite.modeling.attach import Attached
from suite.modeling.loading import LoadedModel

logging.getLogger("lm_eval").setLevel(logging.ERROR)
# lm-eval compiles a task's templates anew for every document and setting: 0.4 ms each, 9 of 10 parts of a GPU's cell
setattr(lm_eval_utils.env, "from_string", functools.cache(lm_eval_utils.env.from_string))  # noqa: B010


def _no_null(value: Any) -> Any:
    """What a template writes; a null of the data would stand in the prompt as the word None."""
    if value is None:
        raise ValueError("a field of its prompt or answer is null")
    return value


lm_eval_utils.env.finalize = _no_null


_BROKEN_DOCUMENT = (ValueError, LookupError, TypeError, AssertionError)  # what lm-eval's templates raise
_BROKEN_TASK = (*_BROKEN_DOCUMENT, OSError, RuntimeError, AttributeError, ImportError)  # at load, from a task's YAML


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
        """Log-likelihood of whole documents over disjoint windows; every position is in scope (PROTOCOL section 3)."""
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
            with _seeded(self.seed, document, request.idx, repeats[id(request)]):
                (texts[i],) = self._generate([request])
            repeats[id(request)] += 1
        for group in groups.values():
            group.sort(key=lambda i: (-len(self.tok_encode(requests[i].args[0])), requests[i].args[0]))
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
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
            output = self._model_generate(
                context=ids.to(self.device),
                attention_mask=mask.to(self.device),
                stop=until,
                max_length=ids.shape[1] + n_new,
                **options,
            )
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
def _seeded(*parts: int) -> Iterator[None]:
    """Random numbers of torch decided by ``parts`` alone; those of the caller go on as if nothing had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))
        yield


def _without_target(place: tuple[int, int], context: str, continuation: str) -> CellError:
    """A continuation without a token of its own would have log-likelihood 0 and win against every other."""
    document, choice = place
    return CellError(
        f"document {document}: choice {choice} {continuation[:40]!r} has no token of its own after "
        f"{context[-40:]!r}: the tokenizer merges it into the context; give the task a target_delimiter"
    )


def build_task(spec: TaskSpec, seed: int) -> Task:
    """Load one lm-eval task with its data from where ``spec`` says; prompt and metrics stay the task's own.

    Raises
    ------
    InputError
        The task or its data cannot be loaded.
    """
    override: dict[str, Any] = {"task": spec.name}
    include: Any = None
    if spec.source == "pack":
        include = PACK_DIR
    elif spec.source == "include":
        include = spec.files["yaml"].parent
    elif spec.name in LOCAL_TASKS:
        include = lm_eval_tasks_dir() / LOCAL_TASKS[spec.name].lm_eval_folder
    elif (file := builtin_file(spec.name)) is not None:
        include = file.parent
    if spec.source == "data_dir":
        files = {split: str(path) for split, path in spec.files.items()}
        override |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        for split in ("training", "validation", "test"):
            if split.removesuffix("ing") not in files:
                override[f"{split}_split"] = None
    # all of lm-eval's task folder takes 10 s to index; one folder takes none
    manager = TaskManager(include_path=include, include_defaults=include is None)
    with quiet():
        try:
            loaded = manager.load([{"group": "suite", "task": [override]}] if len(override) > 1 else [spec.name])
        except _BROKEN_TASK as error:
            raise InputError(
                f"task {spec.name} cannot be loaded ({spec.source}): {_reason(error)}{_remedy(spec)}"
            ) from error
    task: Task = loaded["tasks"][spec.name]
    if spec.num_fewshot is not None:
        task.set_config("num_fewshot", spec.num_fewshot)
    task.set_fewshot_seed(seed)
    if task.config.num_fewshot and hasattr(task, "sampler"):
        Shots(task)
    return task


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _remedy(spec: TaskSpec) -> str:
    """What helps where the data of the hub cannot be had; nothing for files of the user's own."""
    if spec.source != "hub":
        return ""
    return "; offline? give --data-dir" if spec.name in LOCAL_TASKS else "; offline? fill the hub's cache while online"


def sample_indices(n_documents: int, limit: int | None, seed: int) -> list[int]:
    """First ``limit`` documents of a seeded shuffle, in the order of the split; all where limit is None."""
    if limit is None or limit >= n_documents:
        return list(range(n_documents))
    return sorted(np.random.default_rng(seed).permutation(n_documents)[:limit].tolist())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars that lm-eval and datasets write to stderr, one for each task and split."""
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):  # noqa: PTH123
        yield


class BuiltTask:
    """An lm-eval task with its requests built and its documents picked, run once for each setting."""

    def __init__(self, spec: TaskSpec, seed: int, lm: SuiteLM) -> None:
        self.spec = spec
        self.task = build_task(spec, seed)
        n_documents = len(self.task.eval_docs)
        # the pack's files are in a seeded order in which any first items are balanced over the templates
        limit = spec.limit or n_documents
        in_order = spec.source == "pack"
        self.documents = [*range(n_documents)][:limit] if in_order else sample_indices(n_documents, limit, seed)
        try:
            with quiet():
                self.task.build_all_requests(samples=self.documents, **request_options(spec.chat, lm))
        except InputError:  # a ValueError that says it all
            raise
        except _BROKEN_DOCUMENT as error:
            raise InputError(f"task {spec.name}{self._broken_document()}: {_reason(error)}; mend its data") from error
        self.plans: dict[str, Plan] = {}
        self.version = str(self.task.VERSION)
        self.num_fewshot = int(self.task.config.num_fewshot or 0)
        self.fewshot_split = split_of(self.task) if self.num_fewshot else None

    def _broken_document(self) -> str:
        """Which document has no prompt or answer, where one has none."""
        for index in self.documents:
            document = self.task.eval_docs[index]
            try:
                self.task.doc_to_text(document), self.task.doc_to_target(document)
            except _BROKEN_DOCUMENT:
                return f" document {index}"
        return ""

    def run(self, lm: SuiteLM) -> dict[tuple[str, str], list[Sample] | Items]:
        """Answer all requests; per (metric, filter) the documents' (doc_id, value, weight), or their items.

        As ``lm_eval.evaluator.evaluate`` does it, which would build and tokenise the requests anew for each setting.
        """
        by_kind: dict[str, list[Instance]] = defaultdict(list)
        for instance in self.task.instances:
            instance.resps, instance.filtered_resps = [], {}
            by_kind[instance.request_type].extend([instance] * (instance.repeats or 1))
        for kind, instances in by_kind.items():
            for response, instance in zip(getattr(lm, kind)(instances), instances, strict=True):
                instance.resps.append(response)
        self.task.apply_filters()
        by_document: dict[int, list[Instance]] = defaultdict(list)
        for instance in self.task.instances:
            by_document[instance.doc_id].append(instance)
        values: dict[tuple[str, str], list[tuple[str, Any]]] = defaultdict(list)
        for filter_name in self.task.instances[0].filtered_resps:
            for doc_id, instances in by_document.items():
                document = instances[0].doc
                answers = [i.filtered_resps[filter_name] for i in sorted(instances, key=lambda i: i.idx)]
                for metric, value in self.task.process_results(document, answers).items():
                    values[metric, filter_name].append((self._label(doc_id, document), value))
        return collect(self.task, values)

    def higher_is_better(self, metric: str) -> bool | None:
        """The task's own word on a metric's direction; None where it has none."""
        found = self.task.higher_is_better().get(metric)
        return None if found is None else bool(found)

    def _label(self, doc_id: int, document: Any) -> str:
        ours = self.spec.source == "pack"  # a column of that name in other data is no template of generated items
        template = document.get("template") if ours else None
        index = str(self.documents[doc_id])
        return f"{template}/{index}" if template else index

    def chance(self, metric: str) -> float | None:
        """Expected value of blind guessing: mean of right / all choices; 0 for other accuracies and exact matches.

        None where the task scores its choices itself (``process_results``): which of them are right is not known then.
        """
        if metric not in ("acc", "acc_norm", "exact_match"):
            return None
        if self.task.OUTPUT_TYPE != "multiple_choice":
            return 0.0
        return float(np.mean([right / n for n, right in self.choices.values()])) if self.choices else None

    @functools.cached_property
    def choices(self) -> dict[str, tuple[int, int]]:
        """Number of choices and of right ones by document; empty for what is no multiple choice."""
        if self.task.OUTPUT_TYPE != "multiple_choice" or callable(self.task.config.process_results):
            return {}
        documents = {i.doc_id: i.doc for i in self.task.instances}
        return {self._label(i, document): _choices(self.task, document) for i, document in documents.items()}


def _choices(task: Task, document: Any) -> tuple[int, int]:
    """Number of choices of a document and of right ones, by index or by text, as lm-eval's accuracy counts them."""
    choices = task.doc_to_choice(document)
    target = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    if not isinstance(target, list):
        return len(choices), 1
    right = {i for i in target if (0 <= i < len(choices) if isinstance(i, int) else i in choices)}
    return len(choices), len(right)


def samples_of(metric: str, values: Sequence[Sample]) -> list[tuple[str, str, float | str]]:
    """Rows (doc_id, metric, value) of samples.csv, weights as rows of ``<metric>.weight``."""
    rows: list[tuple[str, str, float | str]] = [(doc_id, metric, value) for doc_id, value, _ in values]
    return rows + [(doc_id, metric + WEIGHT, weight) for doc_id, _, weight in values if weight is not None]
