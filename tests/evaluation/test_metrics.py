"""Metrics that are not means, directions and chance: equal to lm-eval's own model and evaluator on the same tasks."""

import json
from itertools import count
from types import SimpleNamespace

import lm_eval
import numpy as np
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from suite import evaluate, get_method
from suite.errors import CellError
from suite.evaluation.evaluator import Evaluator
from suite.evaluation.metrics import Items, aggregate_items
from suite.evaluation.tasks import resolve_task

DENSE = get_method("dense")
# the label is the answer's place; two in three documents have the answer that the tiny model prefers, so that F1 is not 0
ROWS = [
    {"q": f"Is {word} a word?", "label": int(i % 3 == 0)} for i, word in enumerate("sun bee arm ink owl elm".split())
]
CHOICE = "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: label\ndoc_to_choice: ['yes', 'no']\n"
OWN = "import numpy as np\ndef spread(items):\n    return float(np.ptp(items))\n"


def write_task(folder, name, text, rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.py").write_text(OWN)
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}\n"
        f"test_split: test\n{text}"
    )
    return folder


def upstream(tiny, folder, task):
    lm = HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer, batch_size=4)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0)


def assert_as_lm_eval(tiny, folder, task):
    """Every metric has lm-eval's value and direction; the found metrics by name."""
    theirs = upstream(tiny, folder, task)
    result = evaluate(tiny, [task], DENSE, include_path=folder)[task]
    expected = {k for k in theirs["results"][task] if "," in k and "_stderr" not in k}
    assert {f"{m.name},{m.filter}" for m in result.metrics} == expected
    for metric in result.metrics:
        assert metric.value == pytest.approx(theirs["results"][task][f"{metric.name},{metric.filter}"], rel=1e-4), (
            metric
        )
        assert metric.higher_is_better is theirs["higher_is_better"][task][metric.name], metric
    return {m.name: m for m in result.metrics}, result


def test_f1_mcc_and_brier_score_are_lm_evals(tiny, tmp_path):
    listed = "".join(f"  - {{metric: {name}}}\n" for name in ("acc", "f1", "mcc", "brier_score"))
    write_task(tmp_path, "words", f"{CHOICE}metric_list:\n{listed}", ROWS)
    found, result = assert_as_lm_eval(tiny, tmp_path, "words")
    assert found["brier_score"].higher_is_better is False
    assert found["acc"].aggregation == ""
    for name, aggregation in (("f1", "f1"), ("mcc", "matthews_corrcoef"), ("brier_score", "brier_score")):
        assert found[name].aggregation == aggregation
        items = [item for _, metric, item in result.samples if metric == name]
        assert aggregate_items(aggregation, items) == pytest.approx(found[name].value, rel=1e-12)
        assert found[name].stderr == pytest.approx(np.std(found[name].resampled, ddof=1))
    # the Brier score is a mean over documents, so what resampling says of it is known
    brier = [
        sum((p - (i == gold)) ** 2 for i, p in enumerate(probabilities))
        for gold, probabilities in (json.loads(item) for _, metric, item in result.samples if metric == "brier_score")
    ]
    expected = np.std(brier) / np.sqrt(len(brier))
    assert found["brier_score"].stderr == pytest.approx(expected, rel=0.1)  # 1/sqrt(2 * 1000) = 2.2 %


def test_texts_are_scored_as_lm_eval_scores_them(tiny, tmp_path):
    listed = "".join(f"  - {{metric: {name}}}\n" for name in ("bleu", "chrf", "ter"))
    write_task(
        tmp_path,
        "texts",
        "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{q}}'\n"
        f"generation_kwargs: {{until: ['zzz'], max_gen_toks: 6}}\nmetric_list:\n{listed}",
        ROWS[:3],
    )
    found, _ = assert_as_lm_eval(tiny, tmp_path, "texts")
    assert found["ter"].higher_is_better is False
    assert all(len(metric.resampled) == 100 for metric in found.values())


def test_a_tasks_own_aggregation_and_direction_are_used(tiny, tmp_path):
    listed = "  - {metric: acc, aggregation: !function own.spread, higher_is_better: false}\n"
    write_task(tmp_path, "own", f"{CHOICE}metric_list:\n{listed}", ROWS)
    found, _ = assert_as_lm_eval(tiny, tmp_path, "own")
    assert found["acc"].value == 1.0  # of zeros and ones; their mean is 1/3 or 2/3
    assert found["acc"].higher_is_better is False
    assert found["acc"].aggregation == "!function spread"
    assert found["acc"].chance is None
    assert aggregate_items("!function spread", ["1"]) is None


@pytest.mark.parametrize(
    ("aggregate", "reason"),
    [
        (lambda items: {3: 1.0}[len(set(items))], "its aggregation !function <lambda> fails: KeyError"),
        (lambda items: 1.0 if len(set(items)) == 3 else float("nan"), "of resampled documents is not finite"),
    ],
)
def test_what_cannot_be_resampled_has_a_value_and_the_reason(aggregate, reason):
    found = Items("m", "t", ["0", "1", "2", "3"], [1.0, 1.0, 2.0, 3.0], aggregate).measure()
    assert np.isfinite(found.value)
    assert found.resampled is found.stderr is None
    assert reason in found.reason


@pytest.mark.parametrize(("seconds", "n"), [(0.0, 1000), (0.55, 1000), (0.65, None)])
def test_a_slow_machine_has_the_same_intervals_up_to_the_hard_limit(monkeypatch, seconds, n):
    clock = SimpleNamespace(monotonic=lambda ticks=count(): seconds * next(ticks))  # one reading for each resample
    monkeypatch.setattr("suite.statistics.time", clock)
    found = Items("m", "t", ["0", "1", "2"], [1.0, 2.0, 3.0], sum).measure()
    if n is None:
        assert found.resampled is found.stderr is None
        assert (
            found.reason == "no interval for m: stopped at the hard limit of 600 s, before all 1000 resamples were made"
        )
    else:
        assert len(found.resampled) == n
        assert found.reason == ""


def test_one_document_has_a_value_alone():
    found = Items("m", "t", ["s/0", "s/1"], [1.0, 3.0], sum).measure()
    assert (found.value, found.resampled, found.stderr) == (4.0, None, None)


def test_an_aggregation_that_fails_on_the_documents_is_a_failed_cell():
    with pytest.raises(CellError, match="metric m of task t: its aggregation !function sum fails: TypeError"):
        Items("m", "t", ["0", "1"], ["a", "b"], sum).measure()


def test_a_metric_without_a_number_is_a_failed_cell(tiny, tmp_path):
    """A document without bytes has no perplexity a byte; the run's other cells go on."""
    text = "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}}'\nmetric_list: [{metric: byte_perplexity}]\n"
    write_task(tmp_path, "empty", text, [{"q": ""}])
    with pytest.raises(CellError, match="metric byte_perplexity of task empty"):
        Evaluator(tiny).run(resolve_task("empty", include_path=tmp_path), DENSE, mode="none")


def test_chance_counts_every_right_choice(tiny, tmp_path):
    """Two of four choices are right, then one of two: blind guessing is right half of the time."""
    rows = [{"q": "a", "choices": list("bcde"), "label": [0, 2]}, {"q": "b", "choices": list("cd"), "label": [1]}]
    text = (
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: label\ndoc_to_choice: choices\n"
        "metric_list: [{metric: acc}]\n"
    )
    write_task(tmp_path, "several", text, rows)
    result = evaluate(tiny, ["several"], DENSE, include_path=tmp_path)["several"]
    assert result.choices == {"0": (4, 2), "1": (2, 1)}
    assert [metric.chance for metric in result.metrics] == [0.5]
