"""Which rows of a run a cell that is measured again is held against, and which folders fill its placeholders."""

import json

import pytest

from suite.cli import main
from suite.runs.audit.config import config_of
from suite.runs.audit.recompute import recompute
from suite.runs.run import Options, run
from tests.runs.fakes import FakeWorker, FakeWorld, matrix


def test_variants_of_one_task_are_told_apart(tmp_path):
    variants = [{}, {"num_fewshot": 5}, {"limit": 3}, {"apply_chat_template": True}]
    block = {"methods": ["dense", "cats"], "sparsities": [0.5], "tasks": [{"name": "t1"} | v for v in variants]}
    folder = run(matrix(accuracy=[block]), FakeWorld(), FakeWorker(), Options(tmp_path)).folder
    said: list[str] = []
    n_cells = 2 * 2 * len(variants)  # models, methods
    assert recompute(folder, config_of(folder, {}), FakeWorld(), FakeWorker(), n_cells, said.append) == []
    assert said[-1] == f"{n_cells} cells measured again"


class OtherPython(FakeWorld):
    """Where the text of pydoc is another one, and with it the key of every fit on it."""

    def fit_key(self, request):
        return f"other-{super().fit_key(request)}"


def test_a_method_with_a_rank_is_found_by_its_parameters_where_the_text_is_another_one(tmp_path):
    methods = ["cats", *({"name": "md-countdown", "params": {"rank": rank, "exact": "auto"}} for rank in (2, 3))]
    block = {"methods": methods, "modes": ["practical"], "sparsities": [0.5], "tasks": ["t1"]}
    folder = run(matrix(accuracy=[block]), FakeWorld(), FakeWorker(), Options(tmp_path)).folder
    said: list[str] = []
    recompute(folder, config_of(folder, {}), OtherPython(), FakeWorker(), 9, said.append)
    assert said[-1] == "6 cells measured again"  # of 2 models
    said.clear()
    with_predictor = [block | {"methods": ["d-countdown", "cats"]}]
    other = run(matrix(accuracy=with_predictor, name="other"), FakeWorld(), FakeWorker(), Options(tmp_path)).folder
    recompute(other, config_of(other, {}), OtherPython(), FakeWorker(), 9, said.append)
    assert said[-1] == "2 cells measured again"  # predictors are told apart by their keys


def of_folders(folder, *ids):
    """The run as if its models had these names in the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["models"] = [{"id": one} for one in ids]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def models_of(tmp_path, monkeypatch):
    """Models that ``verify --recompute`` takes, by the names in the manifest and the folders given; else its exit code."""
    folder = run(matrix(), FakeWorld(), FakeWorker(), Options(tmp_path)).folder
    found: list[str] = []
    monkeypatch.setattr("suite.cli_actions._world", lambda config: None)
    monkeypatch.setattr("suite.cli_actions._worker", lambda config: None)
    monkeypatch.setattr("suite.report.rebuild.rebuild_problems", lambda folder: [])
    monkeypatch.setattr("suite.runs.audit.verify.verify_files", lambda folder: [])
    monkeypatch.setattr(
        "suite.runs.audit.recompute.recompute",
        lambda _, config, *rest: found.extend(model.id for model in config.models) or [],
    )

    def models(ids, folders):
        of_folders(folder, *ids)
        found.clear()
        options = [text for one in folders for text in ("--model-dir", one)]
        code = main(["verify", str(folder), "--recompute", "1", *options])
        return code or list(found)

    return models


def test_models_of_several_folders_are_found_by_the_order_of_the_folders(models_of, capsys):
    assert models_of(["{model_dir}/x", "{model_dir}/y/z"], ["/m"]) == ["/m/x", "/m/y/z"]
    several = ["{model_dir_1}/x", "hub/name", "{model_dir_2}/x", "{model_dir_1}/z"]
    assert models_of(several, ["/m", "/n"]) == ["/m/x", "hub/name", "/n/x", "/m/z"]
    for given in ([], ["/m"], ["/m", "/n", "/o"]):
        assert models_of(several, given) == 2
        assert f"has its models in 2 folders: give --model-dir 2 times, not {len(given)}" in capsys.readouterr().err
    assert models_of(["{model_dir}/x"], ["/m", "/n"]) == 2
    assert "has its models in 1 folder: give --model-dir once, not 2" in capsys.readouterr().err
    assert models_of(["{model_dir_1}/../x"], ["/m"]) == 2
