"""The one reader of data files: line ends, forms, and every way in which a file can be broken."""

from __future__ import annotations

import gzip
import json

import pytest

from suite import data_files
from suite.data_files import read_documents
from suite.errors import InputError
from suite.evaluation.tasks import DECODE_PERPLEXITY, data_fingerprint, resolve_task
from suite.fitting.calibration import Calibration
from suite.runs.cells.guard import _scored

LONG = "An own paragraph of well over one hundred characters, so that it counts when documents are compared with it. "


def as_text(path, **options):
    return resolve_task(DECODE_PERPLEXITY, options={"text": str(path), **options})


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("blank", ["", "  ", "\t"])
def test_paragraphs_stand_between_blank_lines_whatever_the_line_ends(tmp_path, end, blank):
    path = tmp_path / "prose.txt"
    path.write_bytes(end.join(["one", "of two lines", blank, "two", blank, blank, "three", ""]).encode())
    assert [row["text"] for row in read_documents(path)] == ["one\nof two lines", "two", "three"]
    path.write_bytes(end.join([LONG * 30, blank, "two"]).encode())
    assert len(Calibration(f"file:{path}").documents()) == 2


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_string_of_json_lines_holds_any_character(tmp_path, character, end):
    texts = [f"before{character}after", "second"]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(end.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode())
    assert [row["text"] for row in read_documents(path)] == texts
    assert Calibration(f"file:{path}").documents() == texts


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows", "rows.json.gz", "rows.jsonl.bak"])
def test_a_form_that_is_not_known_is_no_prose(tmp_path, name):
    path = tmp_path / name
    path.write_text(json.dumps([{"text": "first document"}, {"text": "second document"}]))
    for read in (as_text, lambda path: Calibration(f"file:{path}").documents()):
        with pytest.raises(InputError, match=rf"{name}: must end in \.txt.*one a line"):
            read(path)


def test_a_packed_text_is_compared_with_the_calibration_too(tmp_path):
    path = tmp_path / "prose.txt.gz"
    path.write_bytes(gzip.compress(b"first\n\nsecond"))
    assert list(_scored(as_text(path))) == ["first", "second"]


GOOD = b'{"text": "a document"}\n'
BROKEN = {
    "surrogate": (GOOD + rb'{"text": "half \ud83d of it"}', r"line 2: \\ud83d is half of a surrogate pair"),
    "surrogate in a key": (GOOD + rb'{"text": "a", "\udc00": 1}', r"line 2: \\udc00 is half"),
    "digits": (GOOD + b'{"text": "a", "id": ' + b"9" * 5000 + b"}", "line 2: a number of too many digits"),
    "nested": (GOOD + b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 2: brackets are nested too deep"),
    "no field": (GOOD + b'\n{"txt": "a"}', "line 3: no "),
    "null": (GOOD + b'{"text": null}', "line 2: no "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_named_before_anything_is_scored_or_fitted(tmp_path, name):
    content, message = BROKEN[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    for read in (lambda: data_fingerprint(as_text(path)), Calibration(f"file:{path}").documents):
        with pytest.raises(InputError, match=rf"rows\.jsonl {message}") as error:
            read()
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300 + len(str(path))


def test_both_halves_of_a_surrogate_pair_are_a_character(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rb'{"text": "\ud83d\ude00 and \u00e9"}')
    assert read_documents(path) == [{"text": "\U0001f600 and \u00e9"}]


def test_gzip_broken_inside_is_named(tmp_path):
    packed = bytearray(gzip.compress(b"".join(b'{"text": "%d"}\n' % (n * n) for n in range(3000))))
    path = tmp_path / "rows.jsonl.gz"
    for at in range(12, len(packed), len(packed) // 40):  # behind the header, wherever it is
        path.write_bytes(bytes(packed[:at] + bytes([packed[at] ^ 0xFF]) + packed[at + 1 :]))
        with pytest.raises(InputError, match=r"cannot read .*rows\.jsonl\.gz"):
            read_documents(path)


def test_a_file_that_unpacks_to_more_than_the_bound_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "MAX_BYTES", 2**20)
    path = tmp_path / "rows.txt.gz"
    path.write_bytes(gzip.compress(b"a" * 2**20))
    assert len(read_documents(path)[0]["text"]) == 2**20
    path.write_bytes(gzip.compress(b"a" * (2**20 + 1)))
    with pytest.raises(InputError, match=r"rows\.txt\.gz holds more than 1 MiB of text"):
        read_documents(path)


@pytest.mark.parametrize("name", ["a" * 5000 + ".txt", "nul\0.txt"], ids=["long", "nul"])
def test_a_name_that_no_file_can_have_is_no_such_file(name):
    with pytest.raises(InputError, match="no such file"):
        as_text(name)
    with pytest.raises(InputError, match="no such folder"):
        resolve_task("piqa", data_dir=name)
    with pytest.raises(InputError, match="no such folder"):
        resolve_task("own", include_path=name)
    with pytest.raises(InputError, match="cannot read"):
        Calibration(f"file:{name}").documents()
    with pytest.raises(InputError, match="no train split"):
        Calibration(f"train:{name}").documents()


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"question": None, "answer": "4"}, "question"),
        ({"goal": "Open", "sol1": None, "sol2": "wait", "label": 0}, "sol1"),
        ({"question": "Why?", "choices": {"text": [None], "label": ["A"]}, "answerKey": "A"}, "0"),
        ({"sentence": "So _", "option1": 1, "option2": "box", "answer": "1"}, "option1"),
    ],
)
def test_null_is_not_fitted_on_as_a_word(tmp_path, row, key):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + json.dumps(row))
    with pytest.raises(InputError, match=rf"train\.jsonl line 2: not the schema of a known task \('?{key}'? is"):
        Calibration(f"train:{tmp_path}").documents()


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    for name, text in (("a.txt", "one\n\ntwo"), ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert [row["text"] for row in read_documents(tmp_path / name)] == ["one", "two"]
