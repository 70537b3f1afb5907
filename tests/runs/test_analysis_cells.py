"""Analysis cells from YAML to CSV, figure and resume, with a quick worker."""

import csv
from pathlib import Path

import pytest
import yaml

from suite.cli import main
from suite.runs.cells.analysis import expand_analysis
from suite.runs.run import plan
from tests.runs.fakes import FakeWorker, FakeWorld, matrix

ANALYSIS = {"documents": 3, "new_tokens": 5, "sparsities": [0.2, 0.8]}


def cells(**changes):
    return expand_analysis(matrix(analysis=ANALYSIS | changes), FakeWorld())


def test_one_cell_a_model_beside_its_other_cells():
    planned = plan(matrix(analysis=ANALYSIS), FakeWorld())
    assert [cell.model for cell in planned.analysis] == ["a", "b"]
    groups = [cell.load_group for cell in planned.of_models]
    assert groups == sorted(groups)  # a model is loaded once
    assert plan(matrix(), FakeWorld()).analysis == []


@pytest.mark.parametrize("changes", [{"documents": 4}, {"prompt_tokens": 9}, {"new_tokens": 6}, {"sparsities": [0.2]}])
def test_whatever_decides_the_rows_changes_the_key(changes):
    assert cells()[0].key != cells(**changes)[0].key


@pytest.fixture
def run(tmp_path, monkeypatch):
    worker = FakeWorker()
    monkeypatch.setattr("suite.runs.work.worker.TorchWorker", lambda **_: worker)
    monkeypatch.setattr("suite.runs.machine.LocalWorld", FakeWorld)
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump({"name": "m", "models": [{"id": "a"}, {"id": "b"}], "analysis": ANALYSIS}))
    out = tmp_path / "out"
    return worker, out, ["run", str(path), "--results", str(tmp_path / "r"), "--out", str(out)]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_files_figures_resume_and_verify(run, capsys):
    worker, out, command = run
    assert main(command) == 0
    sets = rows(out / "cif_caf.csv")
    assert [(r["model"], r["row_method"], r["sparsity"]) for r in sets] == [
        (model, method, s) for model in ("A", "B") for method in ("cats", "m-countdown") for s in ("0.2", "0.8")
    ]
    layers = [int(r["layer"]) for r in rows(out / "activations.csv") if (r["model"], r["quantity"]) == ("A", "abs_up")]
    assert layers == list(range(11))
    for name in ("cif_caf", "activations"):
        assert (out / "figures" / f"{name}.png").is_file()
        assert f"![{name}](figures/{name}.png)" in (out / "REPORT.md").read_text()
    assert main(["verify", str(out)]) == 0
    worker.ran.clear()
    assert main(command) == 0
    assert worker.ran == []
    (out / "figures" / "cif_caf.csv").write_text("model\n")
    assert main(["verify", str(out)]) == 1


def test_a_failed_analysis_is_exit_1_and_named_in_the_report(run):
    worker, out, command = run
    worker.fail = ("B-135M analysis", "B analysis")
    assert main(command) == 1
    assert {r["model"] for r in rows(out / "cif_caf.csv")} == {"A"}
    report = (out / "REPORT.md").read_text()
    assert "no luck with B analysis" in report.partition("## Failed and skipped")[2].partition("\n## ")[0]


@pytest.mark.parametrize(
    ("analysis", "models", "said"),
    [
        ({"sparsities": [0.0]}, ["a"], "analysis.sparsities.0: must be greater than 0"),
        ({"sparsities": [1.0]}, ["a"], "must be less than 1"),
        ({"documents": 0}, ["a"], "analysis.documents"),
        ({"dokuments": 1}, ["a"], "did you mean 'documents'"),
        ({"text": "arc_easy"}, ["a"], "analysis.text 'arc_easy': must be decode_perplexity"),
        ({}, [], "analysis needs at least one model"),
    ],
)
def test_bad_analysis_is_one_line(run, tmp_path, capsys, analysis, models, said):
    _, _, command = run
    data = {"name": "m", "models": [{"id": name} for name in models], "analysis": analysis}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(data))
    assert main(command) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
