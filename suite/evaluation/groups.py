"""Names that stand for several tasks: groups, tags and patterns of lm-eval, read from its own index; loads no torch."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from suite.errors import InputError
from suite.evaluation.tasks import is_task, known_tasks, lm_eval_tasks_dir, named_by_lm_eval

if TYPE_CHECKING:
    from suite.evaluation.results import Metric, TaskResult

Found = TypeVar("Found")
_PATTERN = frozenset("*?[")
# What a group may say of a member without changing the task that is run.
_HARMLESS = frozenset({"task", "task_alias", "group", "group_alias", "aggregate_metric_list", "metadata", "tag"})


@dataclass(frozen=True)
class Leaf:
    """A task of a group; ``num_fewshot`` where the group gives one."""

    name: str
    num_fewshot: int | None = None


@dataclass(frozen=True)
class Weighting:
    """A metric that a group averages over its tasks, by their documents or each task alike; None: every filter."""

    metric: str
    filters: tuple[str, ...] | None
    by_size: bool


@dataclass(frozen=True)
class Group:
    """A group of lm-eval: its tasks, those of groups inside it included, and what it averages."""

    name: str
    version: str
    tasks: tuple[str, ...]
    weightings: tuple[Weighting, ...]


@dataclass(frozen=True)
class Expansion:
    """What a name stands for: tasks, each once for every number of examples, and the groups named or inside."""

    tasks: tuple[Leaf, ...]
    groups: tuple[Group, ...] = ()


def expand_name(name: str, include_path: str | Path | None = None) -> Expansion:
    """Tasks and groups that a task name, the name of a group or tag, or a pattern such as ``mmlu_*`` stands for.

    A name that nobody knows stands for itself: ``resolve_task`` says what is wrong with it.

    Raises
    ------
    InputError
        A pattern that matches nothing, a group that contains itself or has members that are not tasks, or one that
        changes its tasks.
    """
    if is_task(name, include_path):
        return Expansion((Leaf(name),))
    index = _Index(include_path)
    if _PATTERN & set(name):
        names = fnmatch.filter(index.names(), name)
        if not names:
            raise InputError(f"task pattern {name!r} matches no task and no group")
    else:
        names = [name]
        if index.find(name) is None:
            return Expansion((Leaf(name),))
    tasks: list[Leaf] = []
    groups: dict[str, Group] = {}
    for one in names:
        tasks += _Walk(index, groups).leaves(one, {}, ())
    return Expansion(tuple(dict.fromkeys(tasks)), tuple(groups.values()))


class _Index:
    """lm-eval's index of the user's own folder, and of its own tasks where that does not know a name."""

    def __init__(self, include_path: str | Path | None) -> None:
        self._own = _indexed(Path(include_path)) if include_path is not None else {}

    def names(self) -> list[str]:
        """Every task, group and tag."""
        return sorted({*self._own, *known_tasks(), *_builtin_index()})

    def find(self, name: str) -> Any:
        """Entry of a task, group or tag; None if there is none."""
        if name in self._own:
            return self._own[name]
        # before the index is made, which takes seconds, a search of the files that takes milliseconds
        known = _builtin_index.cache_info().currsize or named_by_lm_eval(name)
        return _builtin_index().get(name) if known else None


def _indexed(folder: Path) -> dict[str, Any]:
    from lm_eval.tasks._index import TaskIndex

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every name that comes twice
    return dict(TaskIndex.build([folder]))


@cache
def _builtin_index() -> dict[str, Any]:
    """Index of lm-eval's own tasks: 15000 files, some seconds."""
    return _indexed(lm_eval_tasks_dir())


class _Walk:
    """Walks down a group; ``groups`` gets every one that is found, inner ones first."""

    def __init__(self, index: _Index, groups: dict[str, Group]) -> None:
        self._index, self._groups = index, groups

    def leaves(self, name: str, given: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[Leaf]:
        """Tasks below a name, with what the groups ``above`` give them."""
        entry = self._index.find(name)
        kind = "TASK" if entry is None else entry.kind.name
        if entry is None and not (not above or is_task(name)):
            raise InputError(
                f"group {above[-1]}: member {name!r} is not a task, group or tag; give it a YAML of its own"
            )
        if kind == "GROUP":
            yield from self._members(name, entry.cfg, given, above)
        elif kind == "TAG":
            for member in sorted(entry.tags):
                yield from self.leaves(member, given, (*above, name))
        else:
            changed = sorted(set(given) - _HARMLESS - {"num_fewshot"})
            if changed:
                raise InputError(
                    f"group {above[-1]}: gives task {name} another {', '.join(changed)}; give the task a YAML of its own"
                )
            yield Leaf(name, given.get("num_fewshot"))

    def _members(
        self, name: str, config: Mapping[str, Any], given: Mapping[str, Any], above: tuple[str, ...]
    ) -> Iterator[Leaf]:
        if name in above:
            raise InputError(f"group {name}: contains itself ({' > '.join((*above, name))})")
        common = {key: value for key, value in config.items() if key not in _HARMLESS} | dict(given)
        found: list[Leaf] = []
        members = config.get("task") or []
        for member in [members] if isinstance(members, str) else members:
            if isinstance(member, str):
                found += self.leaves(member, common, (*above, name))
            elif isinstance(member, Mapping) and "group" in member and self._index.find(str(member["group"])) is None:
                found += self._members(f"{name}::{member['group']}", member, common, (*above, name))
            elif isinstance(member, Mapping) and ("group" in member or "task" in member):
                inner = str(member.get("group", member.get("task")))
                found += self.leaves(inner, common | dict(member), (*above, name))
            else:
                raise InputError(f"group {name}: member {member!r} is not the name of a task or group")
        self._groups[name] = _group(name, config, found)
        yield from found


def _group(name: str, config: Mapping[str, Any], leaves: Sequence[Leaf]) -> Group:
    from lm_eval.config.group import GroupConfig

    try:
        parsed = GroupConfig(group=name, aggregate_metric_list=config.get("aggregate_metric_list"))
    except (TypeError, ValueError) as error:
        raise InputError(f"group {name}: aggregate_metric_list: {str(error).splitlines()[0]}") from error
    metadata = config.get("metadata")
    return Group(
        name,
        str(metadata.get("version", "N/A")) if isinstance(metadata, Mapping) else "N/A",
        tuple(dict.fromkeys(leaf.name for leaf in leaves)),
        tuple(
            Weighting(one.metric, None if one.filter_list is None else tuple(one.filter_list), one.weight_by_size)
            for one in parsed.aggregate_metric_list or []
        ),
    )


def aggregate(group: Group, results: Mapping[str, TaskResult]) -> TaskResult | None:
    """Averages of a group over its tasks' results, as lm-eval makes them; None where the group averages nothing."""
    members = [results[name] for name in group.tasks]
    metrics = []
    of_tasks = [
        {(metric.name, metric.filter): (metric, member.n_samples) for metric in member.metrics} for member in members
    ]
    for one, _, found in averaged_metrics(group, of_tasks):
        metrics.append(_averaged([m for m, _ in found], [n for _, n in found], by_size=one.by_size))
    if not metrics:
        return None
    shares = {member.sparse_share for member in members}
    return replace(
        members[0],
        task=group.name,
        task_version=group.version,
        n_samples=sum(member.n_samples for member in members),
        sparse_share=shares.pop() if len(shares) == 1 else None,
        metrics=metrics,
        samples=[],
        choices={},
    )


def averaged_metrics(
    group: Group, of_tasks: Sequence[Mapping[tuple[str, str], Found]]
) -> Iterator[tuple[Weighting, str, list[Found]]]:
    """What a group averages: the weighting, the filter, and what was found under (metric, filter) of each task that has it."""
    for one in group.weightings:
        present = sorted({chain for task in of_tasks for name, chain in task if name == one.metric})
        for chain in present if one.filters is None else one.filters:
            if found := [task[one.metric, chain] for task in of_tasks if (one.metric, chain) in task]:
                yield one, chain, found


def _averaged(metrics: Sequence[Metric], sizes: Sequence[int], *, by_size: bool) -> Metric:
    """One metric of several tasks."""
    share = shares(sizes, by_size=by_size)
    stderr = average_error([metric.stderr for metric in metrics], sizes, by_size=by_size)
    return replace(
        metrics[0],
        value=float(share @ np.asarray([metric.value for metric in metrics], dtype=np.float64)),
        stderr=stderr,
        aggregation="",
        resampled=None,
        reason="" if stderr is not None else "a task of the group has no standard error",
        chance=average([metric.chance for metric in metrics], sizes, by_size=by_size),
    )


def shares(sizes: Sequence[int], *, by_size: bool) -> np.ndarray:
    """Weight of each task in an average, by its documents or alike, shape (n_tasks,), float64; their sum is 1."""
    weights = np.asarray(sizes, dtype=np.float64) if by_size else np.ones(len(sizes))
    return weights / weights.sum()


def average(values: Sequence[float | None], sizes: Sequence[int], *, by_size: bool) -> float | None:
    """Average of several tasks' values; None where a task has none."""
    known = [value for value in values if value is not None]
    if len(known) != len(values):
        return None
    return float(shares(sizes, by_size=by_size) @ np.asarray(known, dtype=np.float64))


def average_error(errors: Sequence[float | None], sizes: Sequence[int], *, by_size: bool) -> float | None:
    """Standard error of such an average as lm-eval's: pooled by size, or of the plain mean; None where a task has none."""
    known = [error for error in errors if error is not None]
    if len(known) != len(errors):
        return None
    squares = np.square(np.asarray(known, dtype=np.float64))
    if not by_size:
        return float(np.sqrt(np.square(shares(sizes, by_size=False)) @ squares))
    n, weights = sum(sizes), np.asarray(sizes, dtype=np.float64)
    return float(np.sqrt(((weights - 1) * weights * squares).sum() / ((n - len(sizes)) * n)))
