# ruff: noqa: RUF001 - letters that look alike are what the texts of UNICODE are about
"""Shapes of lm-eval tasks, each a few lines of YAML and a few documents, for the comparison with lm-eval itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Rows = Sequence[Mapping[str, Any]]

# Functions that the YAMLs below name with !function.
FUNCTIONS = """
def length(references, predictions, **kwargs):
    return float(abs(len(references[0]) - len(predictions[0])))

def largest(items):
    return max(items)

def upper(dataset):
    return dataset.map(lambda row: {"q": row["q"].upper()})

def letters(doc, results):
    shared = set(doc["a"]) & set(results[0])
    return {"shared": len(shared), "pair": (len(shared), len(results[0]))}

def ratio(items):
    return sum(hit for hit, _ in items) / max(1, sum(size for _, size in items))

def alike(doc, results):
    return {"alike": len(set(results[0])) / len(results[0]), "words": len(" ".join(results[0]).split())}

class Reversed:
    def apply(self, resps, docs):
        return [[text[::-1] for text in row] for row in resps]
"""


@dataclass(frozen=True)
class Shape:
    """One task: its YAML without names and places, and its documents by split.

    ``means`` are the metrics whose standard error lm-eval has in closed form.
    """

    config: Mapping[str, Any]
    test: Rows
    train: Rows = ()
    means: tuple[str, ...] = ()
    members: Mapping[str, Shape] = field(default_factory=dict)
    batch_size: int = 4


def write(folder: Path, name: str, shape: Shape) -> None:
    """Write a shape's YAMLs, documents and functions into ``folder``."""
    (folder / "functions.py").write_text(FUNCTIONS)
    if shape.members:
        for member, part in shape.members.items():
            write(folder, member, part)
        config = {"group": name, "task": list(shape.members), **shape.config}
    else:
        splits = {"test": shape.test} | ({"train": shape.train} if shape.train else {})
        files = {split: str(folder / f"{name}-{split}.jsonl") for split in splits}
        for split, rows in splits.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            Path(files[split]).write_text("".join(lines), encoding="utf-8")
        config = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        config |= ({"training_split": "train"} if shape.train else {}) | dict(shape.config)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1000)
    text = re.sub(r"'(!function functions\.\w+)'", r"\1", text)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def metrics(*names: str, **options: Any) -> list[dict[str, Any]]:
    return [{"metric": name, **options} for name in names]


def choosing(*names: str, **extra: Any) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": metrics(*names),
        **extra,
    }


def answering(*names: str, **extra: Any) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": metrics(*names),
        **extra,
    }


def continuing(*names: str, **extra: Any) -> dict[str, Any]:
    return {
        "output_type": "loglikelihood",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "metric_list": metrics(*names),
        **extra,
    }


def whole(*names: str, **extra: Any) -> dict[str, Any]:
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": metrics(*names),
        **extra,
    }


WORDS = ("red", "stone", "a quick river", "blue lamp", "seven", "the old house", "tea", "winter", "paper", "so")
ITEMS = [
    {"q": f"Item {i} of {WORDS[i % 10]}:", "choices": [WORDS[(i * k + k) % 10] for k in (1, 2, 3)], "label": i % 3}
    for i in range(9)
]
BINARY = [
    {"q": f"Is {word} {i} large?", "choices": ["no", "yes"], "label": (i // 2) % 2} for i, word in enumerate(WORDS)
]
SHOTS = [{"q": f"Shot {i} {word}:", "choices": ["tin", "oak", "gold"], "label": i % 3} for i, word in enumerate(WORDS)]
ANSWERS = [{"q": f"Say {word}:", "a": WORDS[(i + 3) % 10]} for i, word in enumerate(WORDS[:6])]
LONG = [{"q": " ".join(WORDS[(i + k) % 10] for k in range(90)), "a": WORDS[i]} for i in range(3)]
TEXTS = [{"text": " ".join(f"{WORDS[(i * k) % 10]}{k}" for k in range(60 + 40 * i))} for i in range(3)]
UNICODE = [
    {"q": "Zürich — ’s Größe?", "choices": ["naïve café", "日本語の答え", "🙂👍🏽"], "label": 1},
    {"q": "cafe\u0301 vs caf\u00e9\u2028next line", "choices": ["\u00e9", "e\u0301", "Ω≈ç√"], "label": 0},
    {"q": "שלום \u200fعالم", "choices": ["\u00a0space", "tab\tinside", "क्षत्रिय"], "label": 2},
    {"q": "e\u0085f", "choices": ["ﬁ", "fi", "ſ"], "label": 1},
]
NO_CONTEXT = [
    {"q": "", "choices": ["one two", "three", " four"], "label": 2},
    {"q": "", "choices": ["a", "b"], "label": 0},
]
SPACES = [{"q": f"{word}  ", "choices": [" two", "two ", "\nnew"], "label": i % 3} for i, word in enumerate(WORDS[:5])]
MERGED = [
    {"q": "the an", "choices": ["swering", "kle", "s 1"], "label": 0},
    {"q": "one ans", "choices": ["wer ed", "wering", "k"], "label": 1},  # two tokens fewer than apart, one left
    {"q": "Please write down your an", "choices": ["swers it", "swered", "s"], "label": 2},
]
SEVERAL = [{**row, "label": [i % 3, (i + 1) % 3][: 1 + i % 2]} for i, row in enumerate(ITEMS)]
SENTENCES = [
    {"s": f"the {word} was", "options": ["red", "old"], "label": i % 2, "end": " here"} for i, word in enumerate(WORDS)
]
TARGETS = [{"q": f"Give {word}:", "a": [word, WORDS[-i]]} for i, word in enumerate(WORDS[:8])]
# only these letters count, so that some answers of a random model are right
SOME = [{"metric": "exact_match", "regexes_to_ignore": ["[^wkq]"]}]
FIRST = [{"function": "take_first"}]
DIGITS = {"function": "regex", "regex_pattern": "([a-z])"}
ACC = ("acc", "acc_norm")
OPEN = ("output_type", "doc_to_text", "doc_to_target")


def _members() -> dict[str, Shape]:
    return {
        "part_small": Shape(choosing(*ACC), ITEMS[:3], means=ACC),
        "part_large": Shape(choosing(*ACC), SHOTS + ITEMS[3:], means=ACC),
    }


SHAPES: dict[str, Shape] = {
    "choice": Shape(
        choosing("acc", "acc_norm", "acc_bytes", "exact_match"), ITEMS, means=(*ACC, "acc_bytes", "exact_match")
    ),
    "choice_by_default": Shape({k: v for k, v in choosing().items() if k != "metric_list"}, ITEMS, means=ACC),
    "f1_mcc": Shape(choosing("acc", "f1", "mcc"), BINARY, means=("acc",)),
    "f1_one_label": Shape(choosing("f1", "mcc"), [row | {"label": 1} for row in BINARY]),
    "brier": Shape(choosing("brier_score"), ITEMS),
    "likelihood": Shape(choosing("acc_mutual_info"), ITEMS, means=("acc_mutual_info",)),
    "stop": Shape(
        answering("exact_match", generation_kwargs={"until": ["e", "st", "\n\n"], "max_gen_toks": 12}),
        ANSWERS,
        means=("exact_match",),
    ),
    "stop_alias": Shape(
        answering("exact_match", generation_kwargs={"until": "a", "max_new_tokens": 6, "temperature": 0.0}),
        ANSWERS,
        means=("exact_match",),
    ),
    "bleu": Shape(answering("bleu", "chrf", "ter"), ANSWERS),
    "train_shots": Shape(choosing(*ACC, num_fewshot=2, fewshot_split="train"), ITEMS, train=SHOTS, means=ACC),
    "first_shots": Shape(
        choosing(
            *ACC,
            num_fewshot=3,
            fewshot_split="train",
            fewshot_config={"sampler": "first_n"},
            description="Choose. ",
            fewshot_delimiter=" | ",
        ),
        ITEMS,
        train=SHOTS,
        means=ACC,
    ),
    "own_shots": Shape(
        choosing(*ACC, num_fewshot=2, fewshot_config={"sampler": "first_n", "samples": SHOTS[:4]}), ITEMS, means=ACC
    ),
    "scored_shots": Shape(choosing(*ACC, num_fewshot=2, fewshot_split="test"), ITEMS, means=ACC),
    "several_right": Shape(choosing(*ACC), SEVERAL, means=ACC),
    "several_targets": Shape(answering("exact_match", metric_list=SOME), TARGETS, means=("exact_match",)),
    "filters": Shape(
        answering(
            "exact_match",
            repeats=2,
            filter_list=[
                {"name": "letter", "filter": [DIGITS, {"function": "majority_vote"}, *FIRST]},
                {"name": "first", "filter": [*FIRST]},
                {"name": "low", "filter": [{"function": "lowercase"}, *FIRST]},
            ],
        ),
        ANSWERS,
        means=("exact_match",),
    ),
    "empty_context": Shape(choosing(*ACC), NO_CONTEXT, means=ACC),
    "empty_no_delimiter": Shape(choosing(*ACC, target_delimiter=""), NO_CONTEXT, means=ACC),
    "spaces": Shape(choosing(*ACC), SPACES, means=ACC),
    "unicode": Shape(choosing(*ACC, "acc_bytes"), UNICODE, means=(*ACC, "acc_bytes")),
    "unicode_answers": Shape(
        answering("exact_match", "bleu"), [{"q": r["q"], "a": r["choices"][0]} for r in UNICODE], means=("exact_match",)
    ),
    "long_choice": Shape(choosing(*ACC), [{**r, "choices": [*WORDS[:3]], "label": 0} for r in LONG], means=ACC),
    "long_answer": Shape(answering("exact_match"), LONG, means=("exact_match",)),
    "last_word": Shape(continuing("acc", "perplexity"), ANSWERS, means=("acc",)),
    "long_last_word": Shape(continuing("acc", "perplexity"), LONG, means=("acc",)),
    "rolling": Shape(whole("word_perplexity", "byte_perplexity", "bits_per_byte"), TEXTS),
    "group": Shape({"aggregate_metric_list": metrics(*ACC, weight_by_size=True)}, (), means=ACC, members=_members()),
    "group_unweighted": Shape(
        {"aggregate_metric_list": metrics("acc", weight_by_size=False)}, (), means=("acc",), members=_members()
    ),
    "merged": Shape(choosing(*ACC, target_delimiter=""), MERGED, means=ACC),
    "contexts": Shape(
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{label}}",
            "doc_to_choice": "{{[s ~ ' ' ~ options[0], s ~ ' ' ~ options[1]]}}",
            "doc_to_target": "{{end}}",
            "metric_list": metrics("acc"),
        },
        SENTENCES,
        means=("acc",),
    ),
    "lower_is_better": Shape(
        answering(
            metric_list=[{"metric": "!function functions.length", "aggregation": "mean", "higher_is_better": False}]
        ),
        ANSWERS,
        means=("length",),
    ),
    "own_aggregation": Shape(
        answering(
            metric_list=[
                {"metric": "exact_match", "aggregation": "median", "higher_is_better": False},
                {
                    "metric": "!function functions.length",
                    "aggregation": "!function functions.largest",
                    "higher_is_better": False,
                },
            ]
        ),
        ANSWERS,
    ),
    "best_of": Shape(
        answering(
            repeats=3,
            process_results="!function functions.alike",
            filter_list=[{"name": "three", "filter": [{"function": "take_first_k", "k": 3}, *FIRST]}],
            metric_list=[
                {"metric": "alike", "aggregation": "mean", "higher_is_better": False},
                {"metric": "words", "aggregation": "mean", "higher_is_better": True},
            ],
        ),
        ANSWERS,
        means=("alike", "words"),
    ),
    "default_options": Shape(
        {k: answering()[k] for k in OPEN} | {"generation_kwargs": {"max_gen_toks": 8}, "fewshot_delimiter": "e"},
        ANSWERS,
    ),
    "picked_answer": Shape(
        answering(metric_list=SOME, doc_to_choice="{{[a, q]}}", doc_to_target=0, gen_prefix="It is"), ANSWERS
    ),
    "nested_groups": Shape(
        {"aggregate_metric_list": metrics("acc")},
        (),
        means=("acc",),
        members={"inner": Shape({"aggregate_metric_list": metrics("acc")}, (), members=_members())},
    ),
    "long_shots": Shape(
        choosing(*ACC, num_fewshot=9, fewshot_split="train", target_delimiter="\n"), ITEMS, train=SHOTS, means=ACC
    ),
    "own_results": Shape(
        answering(
            process_docs="!function functions.upper",
            process_results="!function functions.letters",
            metric_list=[
                {"metric": "shared", "aggregation": "mean", "higher_is_better": True},
                {"metric": "pair", "aggregation": "!function functions.ratio", "higher_is_better": True},
            ],
        ),
        ANSWERS,
        means=("shared",),
    ),
}
