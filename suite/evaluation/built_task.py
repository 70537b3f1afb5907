"""An lm-eval task with its data, prompts and metrics, built once and run for each setting."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval import utils as lm_eval_utils
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from suite.errors import CellError, InputError
from suite.evaluation.chat import request_options
from suite.evaluation.lm_eval import SuiteLM
from suite.evaluation.metrics import Items, Sample, collect
from suite.evaluation.plan import Plan
from suite.evaluation.results import WEIGHT
from suite.evaluation.shots import Shots, split_of
from suite.evaluation.tasks import LOCAL_TASKS, PACK_DIR, TaskSpec, builtin_file, lm_eval_tasks_dir

# lm-eval compiles a task's templates anew for every document and setting: 0.4 ms each, nine tenths of a cell's time on a GPU
setattr(lm_eval_utils.env, "from_string", functools.cache(lm_eval_utils.env.from_string))  # noqa: B010


def _no_null(value: Any) -> Any:
    """What a template writes; a null of the data would stand in the prompt as the word None."""
    if value is None:
        raise ValueError("a field of its prompt or answer is null")
    return value


lm_eval_utils.env.finalize = _no_null


_BROKEN_DOCUMENT = (ValueError, LookupError, TypeError, AssertionError)  # what lm-eval's templates raise
_BROKEN_TASK = (*_BROKEN_DOCUMENT, OSError, RuntimeError, AttributeError, ImportError)  # at load, from a task's YAML


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
    """What helps where the data of the hub cannot be loaded; nothing for files of the user's own."""
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
            self._check_choices()
        except InputError:  # a ValueError that says it all
            raise
        except _BROKEN_DOCUMENT as error:
            raise InputError(f"task {spec.name}{self._broken_document()}: {_reason(error)}; mend its data") from error
        self.plans: dict[str, Plan] = {}
        self.version = str(self.task.VERSION)
        self.num_fewshot = int(self.task.config.num_fewshot or 0)
        self.fewshot_split = split_of(self.task) if self.num_fewshot else None

    def _check_choices(self) -> None:
        """Refuse documents without a choice, which would vanish, and answers that are none of the choices."""
        if self.task.OUTPUT_TYPE != "multiple_choice":
            return
        asked = {instance.doc_id for instance in self.task.instances}
        place = f"task {self.spec.name} document"
        for doc_id, index in enumerate(self.documents):
            if doc_id not in asked:
                raise InputError(f"{place} {index}: it has no choices; mend its data")
        try:
            choices = self.choices
        except _BROKEN_DOCUMENT as error:
            raise InputError(f"{place}{self._broken_document()}: {_reason(error)}; mend its data") from error
        for label, (n_choices, n_right) in choices.items():
            if not n_right:
                raise InputError(f"{place} {label}: its answer is none of its {n_choices} choices; mend its data")

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
                label = self._label(doc_id, document)
                try:
                    found = self.task.process_results(document, answers)
                except _BROKEN_DOCUMENT as error:
                    raise CellError(
                        f"task {self.spec.name} document {label}: {_reason(error)}; mend its data"
                    ) from error
                for metric, value in found.items():
                    values[metric, filter_name].append((label, value))
        return collect(self.task, values)

    def higher_is_better(self, metric: str) -> bool | None:
        """The task's own word on a metric's direction; None where it has none."""
        found = self.task.higher_is_better().get(metric)
        return None if found is None else bool(found)

    def _label(self, doc_id: int, document: Any) -> str:
        ours = self.spec.source == "pack"  # a column of that name in other data is not a template of generated items
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
        """Number of choices and of right ones by document; empty for what is not multiple choice."""
        if self.task.OUTPUT_TYPE != "multiple_choice" or callable(self.task.config.process_results):
            return {}
        documents = {i.doc_id: i.doc for i in self.task.instances}
        return {self._label(i, document): _choices(self.task, document) for i, document in documents.items()}


def _choices(task: Task, document: Any) -> tuple[int, int]:
    """Number of choices of a document and of right ones, by index or by text, as lm-eval's accuracy counts them."""
    choices = task.doc_to_choice(document)
    target = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    targets = target if isinstance(target, list) else [target]
    right = {i for i in targets if (0 <= i < len(choices) if isinstance(i, int) else i in choices)}
    return len(choices), len(right)


def samples_of(metric: str, values: Sequence[Sample]) -> list[tuple[str, str, float | str]]:
    """Rows (doc_id, metric, value) of samples.csv, weights as rows of ``<metric>.weight``."""
    rows: list[tuple[str, str, float | str]] = [(doc_id, metric, value) for doc_id, value, _ in values]
    return rows + [(doc_id, metric + WEIGHT, weight) for doc_id, _, weight in values if weight is not None]
