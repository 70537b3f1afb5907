"""A task that cannot be prepared: its cells fail with the reason, the others run; no finished cell is lost."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from suite.cli import main
from suite.errors import CellInputError, InputError
from suite.runs.audit.verify import verify_files
from suite.runs.view.manifest import seal
from tests.runs.fakes import FakeWorker, FakeWorld, matrix
from tests.runs.test_runner import go, rows

ROW = {"id": "1", "question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
BLOCK = {"methods": ["dense", "cats"], "sparsities": [0.9]}


class Without(FakeWorld):
    """A world that does not find task t1."""

    def task(self, task):
        if task.name == "t1":
            raise InputError("unknown task 't1'; did you mean 't2'?")
        return super().task(task)


class Unreadable(FakeWorld):
    """A world in which the data of t1 are broken."""

    def data(self, task):
        if task.name == "t1":
            raise InputError("test.jsonl line 2 is broken JSON")
        return super().data(task)


def status_by_task(folder: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in rows(folder):
        found.setdefault(row["task"], set()).add(row["status"])
    return found


@pytest.mark.parametrize(("world", "reason"), [(Without(), "did you mean 't2'"), (Unreadable(), "line 2")])
def test_the_other_tasks_run_and_the_reason_is_in_the_row(tmp_path, world, reason):
    worker, said = FakeWorker(), []
    finished = go(tmp_path, worker, world=world, say=said.append)
    assert (finished.n_ok, finished.n_failed, finished.n_missing) == (10, 14, 0)
    assert not any(" t1 " in label for label in worker.ran)
    assert worker.fitted == []  # only t1 has practical cells: what is made for a cell that cannot run is lost
    assert status_by_task(finished.folder) == {"t1": {"failed"}, "decode_perplexity": {"ok"}}
    assert all(
        reason in row["reason"] and "accuracy." in row["reason"] for row in rows(finished.folder) if row["task"] == "t1"
    )
    assert "24 cells: 0 cached, 10 to run, 14 without their task" in said
    seal(finished.folder)
    assert verify_files(finished.folder) == []

    again = FakeWorker()
    mended = go(tmp_path, again)  # no --rerun: what was bad is looked at anew
    assert (mended.n_ok, mended.n_failed) == (24, 0)
    assert len(again.ran) == 14


def test_a_matrix_without_any_task_that_can_be_prepared_is_refused(tmp_path):
    block = {**BLOCK, "tasks": ["t1"]}
    with pytest.raises(InputError, match=r"^accuracy.0.tasks: unknown task 't1'"):
        go(tmp_path, FakeWorker(), matrix(accuracy=[block]), Without())
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="unknown task"):  # nothing is computed, and a cell of t1 cannot be looked up
        go(tmp_path, FakeWorker(), matrix(), Without(), rerun="none")


def test_the_text_of_the_analysis_fails_its_cell_alone(tmp_path):
    class NoText(FakeWorld):
        def data(self, task):
            if task.limit == 3:
                raise InputError("no such text")
            return super().data(task)

    finished = go(tmp_path, FakeWorker(), matrix(analysis={"documents": 3}), NoText())
    assert (finished.n_ok, finished.n_failed) == (24, 2)


class Broken(FakeWorker):
    """Finds out while it runs that t1, or a whole model, is bad input."""

    def __init__(self, *bad: str, model: str = "") -> None:
        super().__init__()
        self.bad, self.model = bad, model

    def run(self, cell, fits):
        if cell.task.name in self.bad:
            raise CellInputError(f"{cell.task.name}: document 3 has no answer")
        if cell.model == self.model:
            raise InputError(f"model {cell.model} has no gated MLP")
        return super().run(cell, fits)


def test_a_task_that_turns_out_bad_in_mid_run_fails_its_cells_alone(tmp_path):
    finished = go(tmp_path, Broken("t1"))
    assert (finished.n_ok, finished.n_failed, finished.n_missing) == (10, 14, 0)
    assert {row["reason"] for row in rows(finished.folder) if row["task"] == "t1"} == {"t1: document 3 has no answer"}
    assert go(tmp_path, FakeWorker()).n_ok == 24


def test_bad_input_in_mid_run_leaves_a_folder(tmp_path):
    said: list[str] = []
    with pytest.raises(InputError, match="no gated MLP"):
        go(tmp_path, Broken(model="b"), say=said.append)
    (folder,) = tmp_path.glob("runs/*")
    assert [row["status"] for row in rows(folder)].count("ok") == 12
    assert said[-1].startswith("stopped: 12 of 24 cells are finished and kept in ")


class Unloadable(FakeWorker):
    """Cannot load the named models."""

    def __init__(self, *bad: str) -> None:
        super().__init__()
        self.bad = bad

    def session(self, cell):
        if cell.model in self.bad:
            raise InputError(f"{cell.model}: tensor 'lm_head.weight' is missing")
        return super().session(cell)


def test_a_model_that_cannot_be_loaded_fails_its_cells_alone(tmp_path):
    finished = go(tmp_path, Unloadable("a"))
    assert (finished.n_ok, finished.n_failed, finished.n_missing) == (12, 12, 0)
    failed = [row for row in rows(finished.folder) if row["status"] == "failed"]
    assert {(row["model"], row["reason"]) for row in failed} == {("A", "a: tensor 'lm_head.weight' is missing")}
    assert go(tmp_path, FakeWorker()).n_ok == 24


def test_models_of_which_none_can_be_loaded_are_bad_input(tmp_path):
    with pytest.raises(InputError, match=r"tensor 'lm_head\.weight' is missing"):
        go(tmp_path, Unloadable("a", "b"))


def test_a_run_of_bad_tasks_alone_stops_with_its_reasons_and_leaves_a_folder(tmp_path):
    with pytest.raises(
        InputError, match=r"^t1: document 3 has no answer \| decode_perplexity: document 3 has no answer$"
    ):
        go(tmp_path, Broken("t1", "decode_perplexity"))
    (folder,) = tmp_path.glob("runs/*")
    assert {row["status"] for row in rows(folder)} == {"failed"}


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("suite.runs.work.worker.TorchWorker", lambda **_: FakeWorker())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTDOWN_RESULTS", str(tmp_path / "results"))
    tasks = [{"name": "pack_grammar", "limit": 2}, "pack_gramar", "arc_easy", "arc_challenge"]
    for split in ("train", "validation", "test"):
        path = tmp_path / "data" / "arc_easy" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(ROW) + ("\n{\n" if split == "test" else "\n"))
    data = {"name": "bad", "models": [{"id": "embedded"}], "device": "cpu", "data_dir": "data"}
    data["accuracy"] = [{"methods": ["dense"], "sparsities": [0.9], "tasks": tasks[:3]}]
    (tmp_path / "bad.yaml").write_text(yaml.dump(data))
    assert main(["check", "bad.yaml"]) == 2
    out = capsys.readouterr().out
    missing = [line for line in out.splitlines() if line.startswith("missing")]
    assert len(missing) == 2
    assert "'pack_gramar'; did you mean 'pack_grammar'" in missing[0]
    assert "test.jsonl line 2 is broken JSON" in missing[1]
    assert main(["run", "bad.yaml"]) == 1
    (folder,) = (tmp_path / "results" / "runs").iterdir()
    with (folder / "accuracy.csv").open() as file:
        assert {row["task"]: row["status"] for row in csv.DictReader(file)} == {
            "pack_grammar": "ok",
            "pack_gramar": "failed",
            "arc_easy": "failed",
        }
    assert "pack_gramar" in (folder / "REPORT.md").read_text()
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 0, capsys.readouterr().err
