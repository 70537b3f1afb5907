"""A run folder of a stranger: edits that came with a second report, damaged files, folders and Python it names."""

import csv
import gzip
import io
import json
import shutil

import pytest

from suite.cli import main
from suite.errors import InputError
from suite.runs.audit.config import config_of
from suite.runs.audit.tables import table_problems
from suite.runs.audit.verify import verify_files
from suite.runs.run import Options, run
from suite.runs.view.manifest import read_manifest, seal
from tests.runs.fakes import FakeWorker, FakeWorld, matrix

SPEED = {"shapes": ["embedded"], "methods": ["dense", "cats"], "sparsities": [0.5], "threads": [1]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = run(matrix(speed=[SPEED]), FakeWorld(), FakeWorker(), Options(tmp_path_factory.mktemp("r"))).folder
    seal(folder)
    assert verify_files(folder) == []
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def change(folder, name, edit):
    """Rewrite a table; ``edit`` gets its rows, and changes them in place."""
    path = folder / name
    raw = path.read_bytes()
    table = list(csv.DictReader(io.StringIO((gzip.decompress(raw) if name.endswith(".gz") else raw).decode())))
    columns = list(table[0])
    edit(table)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def put(column, value):
    """Edit of one column of a sparse row."""

    def edit(table):
        row = next(r for r in table if r["method"] == "cats" and r["mode"] == "ideal")
        assert row[column] != value
        row[column] = value

    return edit


EDITS = {
    "n_samples": ("accuracy.csv", put("n_samples", "200")),
    "removed samples": ("samples.csv.gz", lambda table: table.__delitem__(slice(3, 5))),
    "value": ("accuracy.csv", put("value", "0.987")),
    "delta": ("accuracy.csv", put("delta_dense", "0.5")),
    "no delta": ("accuracy.csv", put("delta_dense", "")),
    "stderr": ("accuracy.csv", put("stderr", "0.0001")),
    "chance": ("accuracy.csv", put("chance", "0.25")),
    "realised sparsity": ("accuracy.csv", put("sparsity_realized", "0.77")),
    "realised sparsity of a layer": ("sparsity.csv", lambda table: table[0].update(sparsity_realized="0.77")),
    "target": ("accuracy.csv", put("sparsity_target", "0.7")),
    "method": ("accuracy.csv", put("method", "m-countdown")),
    "model": ("accuracy.csv", put("model", "B")),
    "row removed": ("accuracy.csv", lambda table: table.pop()),
    "row doubled": ("accuracy.csv", lambda table: table.append(dict(table[-1]))),
    "speed row removed": ("speed.csv", lambda table: table.pop()),
    "method of a speed row": ("speed.csv", lambda table: table[0].update(method="given")),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_found_from_the_tables_alone_after_a_second_seal(folder, edit):
    name, changed = EDITS[edit]
    change(folder, name, changed)
    seal(folder)
    assert table_problems(folder, read_manifest(folder))
    assert f"{name}: is not what the run wrote: it was changed since" in verify_files(folder)


def test_a_latency_is_held_by_the_hash_of_what_the_run_wrote(folder):
    change(folder, "speed.csv", lambda table: table[0].update(latency_us_median="0.1"))
    seal(folder)
    assert verify_files(folder) == ["speed.csv: is not what the run wrote: it was changed since"]


@pytest.mark.parametrize("name", ["extra.txt", ".hidden", "logs/note.txt", "tables/.x"])
def test_extra_and_hidden_files_are_found_after_a_second_seal(folder, name):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    seal(folder)
    assert verify_files(folder) == [f"{path.relative_to(folder)}: is not in the manifest"]


def test_links_are_found_and_not_followed(folder, tmp_path):
    (folder / "accuracy.csv").unlink()
    (folder / "accuracy.csv").symlink_to(tmp_path / "elsewhere")
    assert verify_files(folder) == ["accuracy.csv: is a link or no plain file"]


def swap(folder):
    one, other = (folder / name for name in ("accuracy.csv", "sparsity.csv"))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def broken_stream(folder):
    data = bytearray((folder / "samples.csv.gz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (folder / "samples.csv.gz").write_bytes(data)


DAMAGE = {
    "cut off": lambda f: (f / "samples.csv.gz").write_bytes((f / "samples.csv.gz").read_bytes()[:-40]),
    "broken stream": broken_stream,
    "no gzip": lambda f: (f / "samples.csv.gz").write_bytes(b"text"),
    "other table": lambda f: (f / "samples.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n")),
    "no number": lambda f: change(f, "samples.csv.gz", lambda table: table[0].update(value="x")),
    "swapped": swap,
    "short row": lambda f: (f / "accuracy.csv").write_bytes((f / "accuracy.csv").read_bytes() + b"a,b\n"),
    "binary": lambda f: (f / "accuracy.csv").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_table_is_named_beside_what_was_found_before(folder, damage, capsys):
    (folder / "extra.txt").write_text("x")
    DAMAGE[damage](folder)
    assert main(["verify", str(folder)]) == 1
    err = capsys.readouterr().err
    assert "problem: extra.txt: is not in the manifest" in err
    assert str(folder / ("accuracy.csv" if damage in ("swapped", "short row", "binary") else "samples.csv.gz")) in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "wrong",
    [
        {"cells": []},
        {"cells": {"a": "x"}},
        {"files": "x"},
        {"key_common": {"accuracy": 3}},
        {"config": []},
        {"models": 1},
    ],
)
def test_a_wrongly_typed_manifest_is_one_line(folder, wrong, capsys):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | wrong))
    assert main(["verify", str(folder)]) == 2
    assert f"manifest.json is broken: {next(iter(wrong))}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"include_path": "/tmp/theirs"}, "include_path '/tmp/theirs' names a folder of the machine it was made on"),
        ({"data_dir": "."}, "data_dir '.' names a folder"),
        (
            {
                "accuracy": [
                    {
                        "methods": ["cats"],
                        "sparsities": [0.5],
                        "tasks": [{"name": "decode_perplexity", "options": {"text": "/etc/x.txt"}}],
                    }
                ]
            },
            "'/etc/x.txt' names",
        ),
        ({"data_dir": "theirs"}, "data_dir 'theirs' names a folder of the machine it was made on"),
        ({"models": [{"id": "{model_dir}/../x"}]}, "names a folder of the machine it was made on"),
        ({"models": [{"id": "/tmp/x"}]}, "names a folder of the machine it was made on"),
        ({"calibration": {"source": "file:/etc/passwd"}}, "'/etc/passwd' names a folder of the machine it was made on"),
        (
            {"accuracy": [{"methods": ["os:System"], "sparsities": [0.5], "tasks": ["t1"]}]},
            "runs Python of method os:System.*--allow-code",
        ),
        ({"predictor": "x"}, "config.predictor is not of the type"),
        ({"predictor": {"sources": 3}}, "config.predictor.sources is not of the type"),
        ({"include_path": "{include_path}"}, "runs Python of the tasks of its include_path.*--allow-code"),
    ],
)
def test_a_manifest_names_no_folder_and_no_python(folder, config, message):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"config": manifest["config"] | config}))
    with pytest.raises(InputError, match=message):
        config_of(folder, {"include_path": "mine", "data_dir": "mine", "model_dir": ["mine"]})


def test_a_foreign_folder_is_refused_before_anything_runs(tmp_path):
    mine = tmp_path / "mine"
    (mine / "logs").mkdir(parents=True)
    files = {name: f"my {name}" for name in ("accuracy.csv", "logs/a.txt", "manifest.json")}
    for name, text in files.items():
        (mine / name).write_text(text)
    worker = FakeWorker()
    with pytest.raises(InputError, match=r"mine is not empty and not a run folder.*--out"):
        run(matrix(), FakeWorld(), worker, Options(tmp_path / "r", folder=mine))
    assert worker.ran == []
    assert {p.relative_to(mine).as_posix(): p.read_text() for p in mine.rglob("*") if p.is_file()} == files


def test_a_second_run_removes_only_what_it_had_written(tmp_path):
    out = tmp_path / "out"
    options = Options(tmp_path / "r", folder=out)
    run(matrix(), FakeWorld(), FakeWorker(fail=["A t1 random ideal 0.5"]), options)
    seal(out)
    (log,) = out.glob("logs/*.txt")
    mine = [out / "logs" / "mine.txt", out / "notes.csv.bak", out / "logs" / ("0" * 16 + ".txt")]
    for path in mine:
        path.write_text("mine")
    (out / ".accuracy.csv.0.part").write_text("left by a kill")
    run(matrix(), FakeWorld(), FakeWorker(), Options(tmp_path / "r", folder=out, rerun="failed"))
    assert not log.exists()
    assert not list(out.glob(".*.part"))
    assert [path.read_text() for path in mine] == ["mine"] * 3


def test_an_empty_folder_and_a_new_one_are_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        assert run(matrix(), FakeWorld(), FakeWorker(), Options(tmp_path / "r", folder=tmp_path / name)).n_ok == 24
