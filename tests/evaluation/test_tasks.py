"""Names to data: every source, and one line for each thing that can be wrong with it."""

import gzip
import json

import pytest

from suite.data_files import read_documents
from suite.errors import InputError
from suite.evaluation.tasks import (
    DECODE_PERPLEXITY,
    PACK_TASKS,
    data_fingerprint,
    known_tasks,
    resolve_task,
)

ROW = {"goal": "open a jar", "sol1": "twist the lid", "sol2": "sing to it", "label": 0}


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    (folder / "piqa").mkdir(parents=True)
    (folder / "piqa" / "validation.jsonl").write_text(json.dumps(ROW) + "\n")
    (folder / "wikitext").mkdir()
    (folder / "wikitext" / "test.jsonl").write_text(json.dumps({"page": "one two three"}) + "\n")
    return folder


@pytest.mark.parametrize("name", PACK_TASKS)
def test_pack_tasks_are_embedded_and_fingerprinted_by_content(name):
    spec = resolve_task(name)
    assert spec.source == "pack"
    assert all(path.is_file() for path in spec.files.values())
    assert len(data_fingerprint(spec)) == 16


def test_fingerprint_follows_the_data_and_not_its_place(data_dir, tmp_path):
    first = data_fingerprint(resolve_task("piqa", data_dir=data_dir))
    moved = data_dir.rename(tmp_path / "elsewhere")
    assert data_fingerprint(resolve_task("piqa", data_dir=moved)) == first
    (moved / "piqa" / "validation.jsonl").write_text(json.dumps(ROW | {"label": 1}) + "\n")
    assert data_fingerprint(resolve_task("piqa", data_dir=moved)) != first


def test_data_dir_keeps_only_the_splits_that_are_there(data_dir):
    assert set(resolve_task("piqa", data_dir=data_dir).files) == {"validation"}


def test_without_a_data_dir_a_builtin_task_comes_from_the_hub():
    assert resolve_task("piqa").source == "hub"
    assert resolve_task("boolq").source == "hub"  # not in the list, found among lm-eval's YAMLs
    assert data_fingerprint(resolve_task("piqa")) == "hub:piqa"


def test_own_yaml_wins_over_the_hub(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json\ndoc_to_text: !function utils.f\n")
    spec = resolve_task("mine", include_path=tmp_path)
    assert spec.source == "include"
    before = data_fingerprint(spec)
    (tmp_path / "utils.py").write_text("def f(doc): return ''\n")
    assert data_fingerprint(spec) != before


def test_decode_perplexity_takes_a_text_file(tmp_path, data_dir):
    text = tmp_path / "prose.txt"
    text.write_text("first passage\n\nsecond passage\nof two lines\n\n\n")
    spec = resolve_task(DECODE_PERPLEXITY, options={"text": str(text), "window": 64})
    assert spec.source == "text"
    assert spec.options["window"] == 64
    assert [row["text"] for row in read_documents(text)] == ["first passage", "second passage\nof two lines"]
    wiki = resolve_task("decode_perplexity_wikitext", data_dir=data_dir)
    assert wiki.options["field"] == "page"


def test_the_window_of_a_rolling_task_is_its_option(data_dir):
    assert resolve_task("wikitext", options={"window": 2048}).options == {"window": 2048}
    assert resolve_task("wikitext").options == {}


def test_gzipped_rows_are_read(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n\n{"text": "b"}\n'))
    assert [row["text"] for row in read_documents(path)] == ["a", "b"]


BAD_TASKS = [
    ({"name": "pack_gramar"}, "did you mean 'pack_grammar'"),
    ({"name": "decode_perplexity_wiki"}, "did you mean 'decode_perplexity_wikitext'"),
    ({"name": "decode_perplexity_wikitext"}, "--data-dir"),
    ({"name": "decode_perplexity", "options": {"windw": 8}}, "did you mean 'window'"),
    ({"name": "decode_perplexity", "options": {"window": 2}}, "window 2"),
    ({"name": "decode_perplexity", "options": {"split": 1.0}}, "split 1.0"),
    ({"name": "decode_perplexity", "options": {"text": "no/such.txt"}}, "no/such.txt"),
    ({"name": "piqa", "options": {"window": 8}}, "takes no options"),
    ({"name": "wikitext", "options": {"windw": 8}}, "did you mean 'window'"),
    ({"name": "wikitext", "options": {"split": 0.5}}, "no option 'split'"),
    ({"name": "wikitext", "options": {"window": 0}}, "window 0"),
    ({"name": "piqa", "limit": 0}, "limit 0"),
    ({"name": "piqa", "data_dir": "no/such/folder"}, "no/such/folder"),
    ({"name": "mine", "include_path": "no/such/folder"}, "no/such/folder"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_TASKS, ids=lambda a: str(a)[:50])
def test_a_bad_task_is_one_line_with_the_remedy(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        resolve_task(**arguments)
    assert "\n" not in str(error.value)


def test_a_missing_split_names_the_file(data_dir):
    with pytest.raises(InputError, match=r"winogrande.*validation\.jsonl is missing"):
        resolve_task("winogrande", data_dir=data_dir)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2 is broken JSON"),
        (b'{"a": 1}\n[1]\n', "line 2: must be a JSON object"),
        (b" \n", "is empty"),
        (b"\xff\xfe{}", "cannot read"),
    ],
)
def test_a_broken_file_names_its_line(tmp_path, content, message):
    path = tmp_path / "piqa" / "validation.jsonl"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        data_fingerprint(resolve_task("piqa", data_dir=tmp_path))


def test_a_truncated_gzip_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 50)[:-9])
    with pytest.raises(InputError, match="cannot read"):
        read_documents(path)


def test_every_known_task_is_named_once():
    assert len(known_tasks()) == len(set(known_tasks()))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"goal": None}, "key 'goal' is null"),
        ({"sol2": ...}, "key 'sol2' is missing"),
        ({"goal": ["a", {"b": None}]}, "key 'goal' is null, or holds null"),
    ],
)
@pytest.mark.parametrize("at", [1, 2])
def test_a_hole_in_a_file_of_known_schema_names_line_and_key(tmp_path, row, message, at):
    good = {"goal": "Open", "sol1": "lift", "sol2": "wait", "label": 0}
    rows = [good, good]
    rows[at - 1] = {key: value for key, value in (good | row).items() if value is not ...}
    path = tmp_path / "piqa" / "validation.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=rf"validation\.jsonl line {at}: {message}"):
        data_fingerprint(resolve_task("piqa", data_dir=tmp_path))


@pytest.mark.parametrize("limit", [2.5, True, "3"])
def test_a_limit_is_a_whole_number(limit):
    with pytest.raises(InputError, match=r"limit .* of task piqa: must be a whole number"):
        resolve_task("piqa", limit=limit)


def test_names_in_quotes_are_found_among_the_tasks_of_lm_eval():
    assert resolve_task("mmlu_abstract_algebra").source == "hub"
