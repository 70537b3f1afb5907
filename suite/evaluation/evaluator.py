"""One loaded model, many settings: runs a task under a method and returns values, samples and realised sparsity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from suite.errors import CellError, CellInputError, InputError
from suite.evaluation.built_task import BuiltTask, sample_indices, samples_of
from suite.evaluation.chat import chat_options
from suite.evaluation.groups import aggregate, expand_name
from suite.evaluation.lm_eval import SuiteLM
from suite.evaluation.metrics import Items, Sample
from suite.evaluation.perplexity import BuiltText
from suite.evaluation.plan import Scope
from suite.evaluation.results import Metric, TaskResult
from suite.evaluation.tasks import TaskSpec, data_fingerprint, resolve_task
from suite.methods.base import Method, Mode
from suite.modeling.attach import LayerSparsity, ThresholdState, attach
from suite.modeling.loading import LoadedModel
from suite.statistics import resampling_group, standard_error, statistic

SCOPES: tuple[Scope, ...] = ("scored", "paper", "all")
LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "kl_dense")


class Evaluator:
    """Runs tasks with one model; each task is built and tokenised once for all settings.

    Parameters
    ----------
    loaded : model and tokenizer
    batch_size : most sequences in a batch
    seed : shuffles the documents that a limit picks, and few-shot examples, and what a task samples

    Raises
    ------
    InputError
        A batch size that is not a whole number of at least 1.
    """

    def __init__(self, loaded: LoadedModel, *, batch_size: int = 16, seed: int = 0) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise InputError(f"batch_size {batch_size!r}: must be a whole number of sequences, at least 1")
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise InputError(f"seed {seed!r}: must be a whole number, at least 0")
        self.loaded = loaded
        self.seed = seed
        self.lm = SuiteLM(loaded, batch_size, seed)
        self._built: dict[str, BuiltTask | BuiltText | CellInputError] = {}

    def run(
        self,
        task: TaskSpec,
        method: Method,
        *,
        mode: Mode,
        state: ThresholdState | None = None,
        scope: Scope = "scored",
    ) -> tuple[TaskResult, list[LayerSparsity]]:
        """Run one task under one setting; ``method`` dense ignores the scope.

        Raises
        ------
        InputError
            The task cannot be loaded, or the method's mode is not possible.
        CellError
            A log-likelihood or metric is not finite.
        """
        if scope not in SCOPES:
            raise InputError(f"scope {scope!r}: must be one of {', '.join(SCOPES)}")
        built = self._build(task)
        dense = mode == "none"
        if isinstance(built, BuiltText) and built.reference is None:
            built.reference = self.lm.scorer.dense_hidden(built.plan)
        with nullcontext() if dense else attach(self.loaded.model, method, state, mode=mode, scope=scope) as attached:
            values: Mapping[tuple[str, str], Sequence[Sample] | Items]
            if isinstance(built, BuiltText):
                scores = self.lm.scorer.score(built.plan, attached, scope, reference=built.reference)
                values = built.values(scores)
                scored, sparse = sum(s.n_scored for s in scores), sum(s.n_sparse for s in scores)
            else:
                self.lm.bind(attached, scope, built.documents, built.plans, task.options.get("window"))
                values = built.run(self.lm)
                scored, sparse = self.lm.scored, self.lm.sparse
            layers = [] if attached is None else attached.sparsity()
        return _result(task, built, values, sparse / scored if scored else None), layers

    def refuse_two(self, task: TaskSpec, other: TaskSpec) -> None:
        """Refuse one task with two numbers of examples, whose results would have one name.

        Raises
        ------
        InputError
            They have.
        """
        if task.num_fewshot == other.num_fewshot:
            return
        shots = sorted(self._build(one).num_fewshot for one in (task, other))
        if shots[0] != shots[1]:
            raise InputError(
                f"task {task.name} is asked for with num_fewshot {shots[0]} and {shots[1]}: evaluate them in two calls"
            )

    def _build(self, task: TaskSpec) -> BuiltTask | BuiltText:
        key = repr(task)
        if key not in self._built:
            try:
                self._built[key] = self._build_text(task) if task.is_text else BuiltTask(task, self.seed, self.lm)
            except InputError as error:  # kept, so that the hub is not asked again for every setting
                self._built[key] = CellInputError(str(error))
        found = self._built[key]
        if isinstance(found, CellInputError):
            raise found
        return found

    def _build_text(self, task: TaskSpec) -> BuiltText:
        bare = self.lm.tok_encode("a", add_special_tokens=False)
        full = self.lm.tok_encode("a")
        return BuiltText(
            task,
            encode=lambda text: self.lm.tok_encode(text, add_special_tokens=False),
            prefix=full[: len(full) - len(bare)],
            max_length=self.lm.max_length,
            documents=lambda n: sample_indices(n, task.limit, self.seed),
        )


def _result(
    task: TaskSpec,
    built: BuiltTask | BuiltText,
    values: Mapping[tuple[str, str], Sequence[Sample] | Items],
    sparse_share: float | None,
) -> TaskResult:
    metrics: list[Metric] = []
    samples: list[tuple[str, str, float | str]] = []
    several = len({filter_name for _, filter_name in values}) > 1
    for (name, filter_name), rows in values.items():
        own = built.higher_is_better(name) if isinstance(built, BuiltTask) else None
        higher = not name.endswith(LOWER_IS_BETTER) if own is None else own
        label = f"{name},{filter_name}" if several else name
        if isinstance(rows, Items):
            found = rows.measure()
            made = (rows.aggregation, found.resampled, found.reason)
            metrics.append(Metric(name, filter_name, higher, found.value, found.stderr, None, *made))
            samples += [(document, label, item) for document, item in rows.samples()]
            continue
        value, stderr = _statistics(task, name, rows)
        chance = built.chance(name) if isinstance(built, BuiltTask) else None
        metrics.append(Metric(name, filter_name, higher, value, stderr, chance))
        samples += samples_of(label, rows)
    n_samples = max(len(rows.items if isinstance(rows, Items) else rows) for rows in values.values())
    choices = built.choices if isinstance(built, BuiltTask) else {}
    return TaskResult(
        task.name,
        built.version,
        built.num_fewshot,
        n_samples,
        sparse_share,
        metrics,
        samples,
        built.fewshot_split,
        choices,
    )


def _statistics(task: TaskSpec, name: str, rows: Sequence[Sample]) -> tuple[float, float | None]:
    """Value and standard error of a metric that is a sum of samples."""
    numbers = [value for _, value, _ in rows]
    weights = [1.0 if weight is None else weight for _, _, weight in rows]
    groups = [resampling_group(doc_id) for doc_id, _, _ in rows]
    try:
        value = statistic(numbers, weights, name)
        stderr = standard_error(numbers, weights, name, groups)
    except InputError as error:  # of this cell's numbers alone: the others of the run go on
        raise CellError(f"metric {name} of task {task.name}: {error}") from error
    if not math.isfinite(value):
        raise CellError(f"metric {name} of task {task.name} is {value}: no number is stored for it")
    return value, stderr


def evaluate(
    loaded: LoadedModel,
    tasks: Sequence[str],
    method: Method,
    *,
    mode: Mode | None = None,
    state: ThresholdState | None = None,
    scope: Scope = "scored",
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    data_dir: str | Path | None = None,
    include_path: str | Path | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    fewshot_as_multiturn: bool | None = None,
) -> dict[str, TaskResult]:
    """Evaluate a method on tasks; always on the masked backend, the truth.

    Parameters
    ----------
    loaded : LoadedModel
        From ``load_model``.
    tasks : names
        ``pack_*``, ``decode_perplexity``, or any task, group, tag or pattern (``mmlu_*``) of lm-eval.
    method : Method
        From ``get_method``.
    mode : ``none``, ``ideal`` or ``practical``; by default practical where ``state`` is given, else ideal.
    state : Fit of the practical mode
    scope : which positions are sparse: ``scored``, ``paper`` or ``all``
    limit : documents of each task (a seeded shuffle picks them), None for all
    data_dir, include_path : where tasks may be found, see ``resolve_task``
    apply_chat_template, system_instruction, fewshot_as_multiturn : as in lm-eval, see ``chat_options``

    Returns
    -------
    dict of task name to TaskResult; of a group each of its tasks, and under its own name what it averages

    Examples
    --------
    >>> result = evaluate(load_model("embedded"), ["decode_perplexity"], get_method("d-countdown", sparsity=0.8))
    """
    if mode is None:
        mode = "none" if method.modes == ("none",) else "practical" if state is not None else "ideal"
    chat: dict[str, Any] = {
        "apply_chat_template": apply_chat_template,
        "system_instruction": system_instruction,
        "fewshot_as_multiturn": fewshot_as_multiturn,
    }
    evaluator = Evaluator(loaded, batch_size=batch_size, seed=seed)
    expansions = [expand_name(name, include_path) for name in tasks]
    specs: dict[str, TaskSpec] = {}
    for leaf in dict.fromkeys(leaf for expansion in expansions for leaf in expansion.tasks):
        spec = resolve_task(
            leaf.name,
            data_dir=data_dir,
            include_path=include_path,
            num_fewshot=leaf.num_fewshot,
            limit=limit,
            chat=chat_options(leaf.name, **chat),
        )
        evaluator.refuse_two(specs.setdefault(leaf.name, spec), spec)
    results: dict[str, Any] = {}
    for expansion in expansions:
        for name in dict.fromkeys(leaf.name for leaf in expansion.tasks):
            if name not in results:
                data_fingerprint(specs[name])  # reads every row: a broken one is refused by its line
                with torch.inference_mode():
                    results[name], _ = evaluator.run(specs[name], method, mode=mode, state=state, scope=scope)
        for group in expansion.groups:
            if (averages := aggregate(group, results)) is not None:
                results[group.name] = averages
    return results
