"""Calibration text and its windows."""

import gzip
import json

import pytest

from suite.errors import InputError
from suite.fitting.calibration import Calibration
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
        ("missing.txt", None, "cannot be read"),
        ("a.csv", b"x", "must end in"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2: no JSON"),
        ("a.jsonl", b'{"txt": "x"}', "line 1: no field 'text'"),
        ("a.jsonl", b'{"text": "x"}', "at least 2 documents"),
        ("a.txt", b"", "at least 2 documents"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
    ],
)
def test_bad_files(tmp_path, name, content, match):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=match):
        Calibration(f"file:{tmp_path / name}").documents()


@pytest.mark.parametrize("source", ["pydocs", "file:", "c4", ""])
def test_bad_sources(source):
    with pytest.raises(InputError, match="unknown calibration"):
        Calibration(source)


@pytest.mark.parametrize("max_tokens", [0, 1, 2.5])
def test_bad_budgets(max_tokens):
    with pytest.raises(InputError, match="max_tokens"):
        Calibration(max_tokens=max_tokens)
