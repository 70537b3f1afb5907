"""What is wrong with a task or its data is one line with task, document and choice."""

from types import SimpleNamespace

import pytest

from suite import evaluate, get_method
from suite.errors import CellError, InputError
from suite.evaluation.tasks import resolve_task
from suite.runs.estimate import _elsewhere
from tests.evaluation.conftest import choices_task

DENSE = get_method("dense")


def test_a_context_of_blanks_without_a_bos_is_named(tiny, tmp_path):
    folder = choices_task(tmp_path, [{"q": "  ", "choices": ["two", "three"], "gold": 0}])
    with pytest.raises(CellError, match=r"document 0: choice 0 ' two' follows the context '  ', which has no token"):
        evaluate(tiny, ["own"], DENSE, include_path=folder)


def test_a_column_named_template_groups_nothing_in_own_data(tiny, tmp_path):
    rows = [{"q": f"{i} is", "choices": ["a", "b"], "gold": i % 2, "template": "same"} for i in range(6)]
    result = evaluate(tiny, ["own"], DENSE, include_path=choices_task(tmp_path, rows))["own"]
    assert [document for document, _, _ in result.samples] == [str(i) for i in range(6)]
    assert result.metrics[0].stderr is not None


@pytest.mark.parametrize(
    "settings",
    [
        {"metric_list": [5]},  # TypeError
        {"test_split": "test[9:]"},  # IndexError
        {"doc_to_text": "!function nowhere.none"},
    ],
)
def test_a_task_that_breaks_at_load_is_one_line(tiny, tmp_path, settings):
    folder = choices_task(tmp_path, [{"q": "a", "choices": ["b", "c"], "gold": 0}], **settings)
    text = (folder / "own.yaml").read_text().replace('"!function nowhere.none"', "!function nowhere.none")
    (folder / "own.yaml").write_text(text)
    with pytest.raises(InputError, match=r"^task own cannot be loaded \(include\): .+$"):
        evaluate(tiny, ["own"], DENSE, include_path=folder)


def test_check_offers_a_data_folder_for_the_tasks_that_have_one(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cells = [SimpleNamespace(task=resolve_task(name)) for name in ("piqa", "mmlu_anatomy", "arc_easy")]
    (both,) = _elsewhere(cells, SimpleNamespace(speed=[]), None)
    assert "give --data-dir (for piqa, arc_easy)" in both
    (hub_alone,) = _elsewhere(cells[1:2], SimpleNamespace(speed=[]), None)
    assert "--data-dir" not in hub_alone


def test_a_null_in_own_data_is_named_and_not_scored_as_the_word_none(tiny, tmp_path):
    rows = [{"q": f"{q}", "choices": ["a", "b"], "gold": 0} for q in "xy"]
    rows[1]["q"] = None
    with pytest.raises(
        InputError, match=r"^task own document 1: a field of its prompt or answer is null; mend its data$"
    ):
        evaluate(tiny, ["own"], DENSE, include_path=choices_task(tmp_path, rows))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"choices": []}, "document 1: it has no choices"),
        ({"gold": 9}, "document 1: its answer is none of its 2 choices"),
        ({"gold": -1}, "document 1: its answer is none of its 2 choices"),
        ({"gold": "maybe"}, "document 1: its answer is none of its 2 choices"),
    ],
)
def test_a_document_without_choices_or_a_right_one_is_named(tiny, tmp_path, broken, message):
    """One vanished from the mean, the others were scored 0."""
    rows = [{"q": q, "choices": ["a", "b"], "gold": 0} for q in "xy"]
    rows[1] |= broken
    with pytest.raises(InputError, match=f"^task own {message}; mend its data$"):
        evaluate(tiny, ["own"], DENSE, include_path=choices_task(tmp_path, rows))


@pytest.mark.parametrize("seed", [-1, 1.5, True])
def test_a_seed_is_a_whole_number(tiny, seed):
    with pytest.raises(InputError, match="must be a whole number, at least 0"):
        evaluate(tiny, ["decode_perplexity"], DENSE, seed=seed)
