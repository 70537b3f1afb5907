"""Groups of cells run in other processes give the same run as in this one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from suite.config import build_config
from suite.errors import InputError
from suite.runs.group import Done, Group, Progress, run_group
from suite.runs.machine import LocalWorld
from suite.runs.run import Options, run
from suite.runs.work.base import Worker
from suite.runs.work.worker import TorchWorker
from tests.runs.fakes import FakeWorker, matrix
from tests.runs.test_runner import go, rows, without
from tests.runs.tiny_world import tiny_models

SPEED = {"shapes": ["embedded"], "methods": ["dense", "cats"], "sparsities": [0.5], "threads": [1]}


def in_spawned(groups: Iterable[Group], worker: Worker, progress: Progress) -> Iterator[Done]:
    """One after the other, each in a process that has inherited nothing."""
    for group in groups:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield pool.submit(run_group, group, worker).result()


def all_at_once(groups: Iterable[Group], worker: Worker, progress: Progress) -> Iterator[Done]:
    """All but the timed ones, which want the machine for themselves."""
    timed, others = [], []
    for group in groups:
        (timed if group.is_timed else others).append(group)
    assert (len(timed), len(others)) == (1, 2)
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(run_group, group, worker) for group in others]:
            yield future.result()
    yield from in_spawned(timed, worker, progress)


@pytest.mark.parametrize("executor", [in_spawned, all_at_once])
def test_other_processes_fill_the_same_store(tmp_path, executor):
    config = matrix(speed=[SPEED])
    here = go(tmp_path / "here", FakeWorker(), config)
    worker = FakeWorker()
    there = go(tmp_path / "there", worker, config, executor=executor)
    assert (there.n_ok, there.n_failed, there.n_missing) == (here.n_ok, 0, 0)
    assert (worker.loads, worker.ran, worker.timed) == ([], [], [])  # this process did nothing of it
    assert without(there.folder, "elapsed_s") == without(here.folder, "elapsed_s")
    assert rows(there.folder, "speed.csv") == rows(here.folder, "speed.csv")


def test_a_cell_that_fails_elsewhere_is_recorded_and_bad_input_comes_back(tmp_path):
    failed = go(tmp_path, FakeWorker(fail=["A t1 cats ideal"]), executor=in_spawned)
    assert failed.n_failed == 2
    with pytest.raises(InputError, match="no such model"):
        go(tmp_path / "other", NoModel(), matrix(models=[{"id": "a"}]), executor=in_spawned)


class NoModel(FakeWorker):
    """Has no model."""

    def session(self, cell):
        raise InputError("no such model")


def test_a_model_is_loaded_fitted_and_evaluated_in_another_process(tmp_path):
    model = tiny_models(tmp_path)[0]
    block = {"methods": ["dense", "cats"], "modes": ["practical"], "sparsities": [0.5]}
    block |= {"tasks": [{"name": "pack_grammar", "limit": 2}], "scopes": ["scored"]}
    config = build_config(
        {
            "name": "tiny",
            "models": [{"id": str(model)}],
            "device": "cpu",
            "calibration": {"max_tokens": 512},
            "accuracy": [block],
        },
        "test",
    )
    folders = {}
    for name, executor in (("here", None), ("there", in_spawned)):
        options = Options(tmp_path / name, **({"executor": executor} if executor else {}))
        found = run(config, LocalWorld(config), TorchWorker(), options)
        assert (found.n_ok, found.n_failed) == (2, 0)
        folders[name] = found.folder
    assert without(folders["there"], "elapsed_s") == without(folders["here"], "elapsed_s")


def test_a_process_knows_what_the_groups_before_it_have_found(tmp_path):
    """The fit of a model's accuracy cells is that of the other groups, and is made once."""
    seen: list[tuple[int, int]] = []

    def noting(groups: Iterable[Group], worker: Worker, progress: Progress) -> Iterator[Done]:
        for group in groups:
            done = run_group(group, worker, progress)
            seen.append((len(group.outputs), len(done.outputs)))
            yield done

    go(tmp_path, FakeWorker(), executor=noting)
    assert seen == [(0, 2), (2, 4)]
