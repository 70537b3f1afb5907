"""Names and order of tasks as columns; a task with several numbers of examples, chat options or limits is several."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd

from suite.evaluation.tasks import known_tasks

TEXT_METRICS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "kl_dense", "top1_agreement")
_METRIC_TITLES = {
    "perplexity": "perplexity",
    "word_perplexity": "word perplexity",
    "byte_perplexity": "byte perplexity",
    "bits_per_byte": "bits per byte",
    "kl_dense": "KL to dense",
    "top1_agreement": "top-1 agreement %",
}
Words = Callable[[Iterable[str]], dict[str, str]]


def bare(task: str) -> str:
    """A task's own name."""
    return task.partition("[")[0]


def task_order(task: str) -> tuple[int, str]:
    """Sort key: the order that ``ls`` shows, then others by name."""
    names, name = known_tasks(), bare(task)
    return (names.index(name) if name in names else len(names), task)


def text_order(column: str) -> tuple[Any, ...]:
    """Sort key of a ``task metric`` column."""
    task, _, metric = column.partition(" ")
    return (*task_order(task), TEXT_METRICS.index(metric))


def text_title(column: str) -> str:
    """Heading of a ``task metric`` column."""
    task, _, metric = column.partition(" ")
    return f"{task}, {_METRIC_TITLES.get(metric, metric)}"


def with_variant_names(rows: pd.DataFrame, manifest: Mapping[str, Any]) -> pd.DataFrame:
    """Accuracy rows, a task of several variants renamed to ``task[5-shot,chat]`` by what tells them apart.

    Without a space: ``task metric`` are the names of columns.
    """
    variants = rows[["task", "chat", "limit"]].assign(num_fewshot=_numbers_of_examples(rows, manifest))
    names = rows["task"].copy()
    for task, group in variants.groupby("task", sort=False):
        words = {column: make(set(group[column])) for column, make in _WORDS.items() if group[column].nunique() > 1}
        if words:
            parts = [group[column].map(word) for column, word in words.items()]
            names[group.index] = [f"{task}[{','.join(one)}]" for one in zip(*parts, strict=True)]
    return rows.assign(task=names)


def _numbers_of_examples(rows: pd.DataFrame, manifest: Mapping[str, Any]) -> pd.Series:
    """Number of examples of each row; of a cell that has not run the task's own, where it asks for no other."""
    numbers, found = rows["num_fewshot"].copy(), rows[rows["num_fewshot"] != ""]
    asked = {name: cell["fields"].get("task") for name, cell in manifest.get("cells", {}).items() if "fields" in cell}
    own = {name for name, task in asked.items() if isinstance(task, Mapping) and task.get("num_fewshot") is None}
    if own:
        found = found[found["cell_id"].isin(own)]
    for task, group in rows[rows["num_fewshot"] == ""].groupby("task"):
        known = found.loc[found["task"] == task, "num_fewshot"].unique()
        if len(known) == 1:
            numbers[group.index] = known[0]
    return numbers


def _chat_words(texts: Iterable[str]) -> dict[str, str]:
    """Names of chat options, written as in ``accuracy.csv``; numbered where they differ in the text of a prompt alone."""
    words = {text: _chat_word(text) for text in sorted(texts)}
    count, seen = Counter(words.values()), Counter[str]()
    for text, word in words.items():
        if count[word] > 1:
            seen[word] += 1
            words[text] = f"{word}-{seen[word]}"
    return words


def _chat_word(text: str) -> str:
    try:
        options = json.loads(text or "{}")
    except ValueError:
        return "chat"
    word = "chat" if options.get("apply_chat_template") else "no-chat"
    if options.get("apply_chat_template") and not options.get("fewshot_as_multiturn"):
        word += "-in-one-turn"
    return word + ("-with-system-prompt" if "system_instruction" in options else "")


_WORDS: dict[str, Words] = {
    "num_fewshot": lambda values: {value: f"{value}-shot" if value else "own-shots" for value in values},
    "chat": _chat_words,
    "limit": lambda values: {value: f"limit-{value}" if value else "all-documents" for value in values},
}
