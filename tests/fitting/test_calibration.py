"""Calibration text and its windows."""

import gzip
import json

import pytest

from suite.errors import InputError
from suite.fitting.calibration import Calibration, fingerprints
from suite.fitting.windows import WINDOW, batches, make_windows


class Words:
    """Tokenizer: one number a word."""

    def __call__(self, text):
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.fixture
def numbers(tmp_path):
    """40 documents of 100 words that name their document."""
    path = tmp_path / "numbers.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join([str(n)] * 100)}) for n in range(40)))
    return f"file:{path}"


def test_pydoc_is_prose():
    calibration = Calibration()
    documents = calibration.documents()
    assert len(documents) > 50
    text = "\n".join(documents)
    assert "::=" not in text
    assert "***" not in text
    assert sum(map(str.isalpha, text)) / len(text) > 0.75
    assert not calibration.in_domain
    assert "Python 3." in calibration.description
    assert calibration.fingerprint() == Calibration(max_tokens=10).fingerprint()  # of the text alone


def test_no_document_is_fitted_on_and_held_out(numbers):
    windows = make_windows(Calibration(numbers, max_tokens=3000), Words(), seed=0)
    fitted, held_out = ({token for window in part for token in window} for part in (windows.fit, windows.held_out))
    assert not fitted & held_out
    assert (len(fitted), len(held_out)) == (30, 10)
    assert (sum(map(len, windows.fit)), sum(map(len, windows.held_out))) == (2250, 750)


def test_windows_depend_on_the_seed_alone(numbers):
    first = make_windows(Calibration(numbers, 1000), Words(), seed=0)
    assert first == make_windows(Calibration(numbers, 1000), Words(), seed=0)
    assert first != make_windows(Calibration(numbers, 1000), Words(), seed=1)


def test_text_shorter_than_the_budget_is_used_up(numbers):
    windows = make_windows(Calibration(numbers, max_tokens=10**6), Words(), seed=0)
    assert sum(map(len, windows.fit)) + sum(map(len, windows.held_out)) == 4000


def test_batches_are_bounded_and_padded_at_the_right():
    windows = [[5] * WINDOW, [6] * 10, [7] * 3]
    found = list(batches(windows, 2 * WINDOW))
    assert [ids.shape for ids, _ in found] == [(2, WINDOW), (1, 3)]
    ids, mask = found[0]
    assert mask.sum(-1).tolist() == [WINDOW, 10]
    assert (ids[1, :10] == 6).all()
    assert (ids[1, 10:] == 0).all()


def test_files_of_each_kind_and_equal_text_have_equal_fingerprints(tmp_path):
    lines = "\n".join(json.dumps({"text": text}) for text in ("one", "two")).encode()
    (tmp_path / "a.jsonl").write_bytes(lines + b"\n\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    plain, packed = (Calibration(f"file:{tmp_path / name}") for name in ("a.jsonl", "b.jsonl.gz"))
    assert plain.documents() == ["one", "two"]
    assert plain.fingerprint() == packed.fingerprint()
    assert plain.description == "2 documents of a.jsonl"
    (tmp_path / "c.txt").write_text("\n\n".join(["word " * 100] * 12))
    assert len(Calibration(f"file:{tmp_path / 'c.txt'}").documents()) == 3


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("missing.txt", None, "cannot read"),
        ("a.csv", b"x", "must end in"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is broken JSON"),
        ("a.jsonl", b'{"txt": "x"}', "line 1: no field 'text'"),
        ("a.jsonl", b'{"text": "x"}', "at least 2 documents"),
        ("a.txt", b"", "at least 2 documents"),
        ("a.txt", b"\xff\xfe\xff", "cannot read"),
        ("a.jsonl.gz", b"no gzip", "cannot read"),
    ],
)
def test_bad_files(tmp_path, name, content, match):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=match):
        Calibration(f"file:{tmp_path / name}").documents()


def test_folders_and_pages(tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps({"page": "third"}))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("first", "second")))
    (tmp_path / "notes.md").write_text("not a text")
    assert Calibration(f"file:{tmp_path}").documents() == ["first", "second", "third"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no file that ends in"):
        Calibration(f"file:{tmp_path / 'empty'}").documents()


CHOICES = {"text": ["red", "blue"], "label": ["A", "B"]}
ROWS = {
    "arc_easy": ({"question": "Why?", "choices": CHOICES, "answerKey": "B"}, "Question: Why?\nAnswer: blue"),
    "openbookqa": ({"question_stem": "It is", "choices": CHOICES, "answerKey": "A"}, "It is red"),
    "winogrande": (
        {"sentence": "So _ broke.", "option1": "cup", "option2": "box", "answer": "2"},
        "So box broke.",
    ),
    "piqa": ({"goal": "Open", "sol1": "lift", "sol2": "wait", "label": 0}, "Question: Open\nAnswer: lift"),
    "gsm8k": ({"question": "1+1?", "answer": "#### 2"}, "Question: 1+1?\nAnswer: #### 2"),
    "own": ({"text": "free text"}, "free text"),
}


def test_train_splits_of_tasks_with_their_right_answers(tmp_path):
    for name, (row, _) in ROWS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps(row))
    found = Calibration("train:" + ",".join(str(tmp_path / name) for name in ROWS))
    assert found.documents() == [shown for _, shown in ROWS.values()]
    assert found.in_domain
    assert found.description == f"6 documents of the train splits of {', '.join(ROWS)}"
    assert not Calibration(f"file:{tmp_path / 'own' / 'train.jsonl'}").in_domain
    with pytest.raises(InputError, match="task truthfulqa_mc1 has no train split; name another source"):
        Calibration(f"train:{tmp_path}/truthfulqa_mc1").documents()
    (tmp_path / "own" / "train.jsonl").write_text('{"other": 1}')
    with pytest.raises(InputError, match="line 1: not the schema of a known task"):
        Calibration(f"train:{tmp_path}/own").documents()


def test_fingerprints_are_of_long_paragraphs_whatever_their_case_and_spaces():
    long = "It was the best of times, it was the worst of times, it was the age of wisdom and of much else besides."
    same = fingerprints([f"short\n{long}"])
    assert len(same) == 1
    assert same == fingerprints([long.upper().replace(" ", "  ")])
    assert not fingerprints([long[:90]])


@pytest.mark.parametrize("source", ["pydocs", "file:", "train:", "c4", ""])
def test_bad_sources(source):
    with pytest.raises(InputError, match="unknown calibration"):
        Calibration(source)


@pytest.mark.parametrize("max_tokens", [0, 1, 2.5])
def test_bad_budgets(max_tokens):
    with pytest.raises(InputError, match="max_tokens"):
        Calibration(max_tokens=max_tokens)
