"""Writing whole files, and folders of strangers that lead outside."""

import os
from pathlib import Path

import pytest

from suite.errors import InputError
from suite.files import links_in, write_atomically
from suite.runs.view.manifest import seal
from tests.report.synthetic import hand_run, hits

DENSE = ("dense", "none", 0.0, 0.0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return hand_run(tmp_path / "run", {DENSE: {"a": hits(50)}})


@pytest.mark.parametrize(
    "name", ["REPORT.md", "claims.csv", "tables", "figures", "tables/accuracy.md", "manifest.json"]
)
def test_nothing_is_written_through_a_link_of_a_run_folder(tmp_path, run, name, capsys):
    from suite.cli import main

    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.md").write_text("mine")
    is_folder = name in ("tables", "figures")
    target = outside if is_folder else outside / "mine.md"
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)
    assert main(["report", str(run)]) == 2
    assert f"{run / name} is a link" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"mine.md": "mine"}


def test_a_folder_with_a_link_is_not_sealed(tmp_path, run):
    (run / "manifest.json").write_text("{}")
    (run / "x").symlink_to(tmp_path)
    with pytest.raises(InputError, match="x is a link"):
        seal(run)


def test_the_folder_itself_may_be_a_link(tmp_path, run):
    from suite.report.page import write_report

    (tmp_path / "short").symlink_to(run)
    assert write_report(tmp_path / "short").is_file()


def test_writing_replaces_a_link_and_not_what_it_points_to(tmp_path):
    (tmp_path / "outside").write_text("mine")
    for name in ("file", ".file.tmp"):  # a fixed name of the temporary file would be followed
        (tmp_path / name).symlink_to(tmp_path / "outside")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "outside").read_text() == "mine"
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not (tmp_path / "file").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".file.tmp", "file", "outside"]


def test_two_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    """The second writes whole while the first is at its fsync; both end well, and no part is left."""
    fsync, nested = os.fsync, []

    def meanwhile(number: int) -> None:
        if not nested:
            nested.append(1)
            write_atomically(tmp_path / "file", b"second")
        fsync(number)

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_atomically(tmp_path / "file", b"first")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_links_and_pipes_are_found_wherever_they_are(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").write_text("x")
    (tmp_path / "a" / "b" / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / ".pipe")
    assert sorted(links_in(tmp_path)) == [".pipe", "a/b/gone"]


def test_what_killed_processes_left_of_a_file_goes_with_its_next_writing(tmp_path):
    old, fresh, other = (tmp_path / name for name in (".a.csv.1.part", ".a.csv.2.part", ".b.csv.1.part"))
    for path in (old, fresh, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (0, 0))
    write_atomically(tmp_path / "a.csv", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [fresh.name, other.name, "a.csv"]
