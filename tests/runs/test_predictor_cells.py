"""Practical cells of methods with a predictor, through the command line on a tiny model."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from suite.cli import main
from suite.config import build_config
from suite.errors import InputError
from suite.runs.cells.accuracy import expand
from suite.runs.work.worker import TorchWorker
from tests.runs.fakes import FakeWorld, matrix
from tests.runs.test_end_to_end import rows, world, written

__all__ = ["world"]  # the fixture
PARAGRAPH = (
    "A page of the scored split that is long enough to be told from every other page by its words alone, it says."
)


def predictors(world: Path, name: str = "tiny-llama", methods=("d-countdown",), **predictor) -> dict:
    block = {"methods": ["dense"], "sparsities": [0.5], "tasks": ["arc_easy"]}
    practical = block | {"methods": list(methods), "modes": ["practical"]}
    return {
        "name": "small",
        "models": [{"id": str(world / name)}],
        "device": "cpu",
        "data_dir": str(world / "data"),
        "predictor": {"max_tokens": 2048, "epochs": 1} | predictor,
        "accuracy": [block, practical],
    }


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_kinds_ranks_and_estimators_are_axes_with_their_bytes(world, tmp_path):
    config = predictors(world, predictors=["low-rank", "ternary"], ranks=[4, 8], estimators=["calibrated", "zero"])
    command = ["run", written(tmp_path, config), "--results", str(tmp_path / "r"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    practical = [row for row in rows(tmp_path / "out") if row["mode"] == "practical" and row["metric"] == "acc"]
    settings = {(row["predictor"], row["rank"], row["estimator"]) for row in practical}
    assert len(practical) == len(settings) == 6
    assert {(kind, rank) for kind, rank, _ in settings} == {("low-rank", "4"), ("low-rank", "8"), ("ternary", "")}
    for row in practical:
        own = 0.25 / 12 if row["predictor"] == "ternary" else int(row["rank"]) * (16 + 40) / (3 * 16 * 40)
        assert float(row["bytes_share"]) == pytest.approx(1 - float(row["sparsity_realized"]) + own)
    layers = csv_rows(tmp_path / "out" / "predictor.csv")
    assert len(layers) == 6 * 2
    assert {row["fit_id"] for row in layers} == {row["fit_id"] for row in practical}
    for row in layers:
        assert all(row[name] for name in row if name not in ("rank", "predictor_input")), row
        assert 0 <= float(row["mass_kept"]) <= 1
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_a_predictor_is_shared_by_cells_and_found_again(world, tmp_path, capsys):
    config = predictors(world, methods=("d-countdown", "s-countdown"))
    command = ["fit", written(tmp_path, config), "--results", str(tmp_path / "r")]
    assert main(command) == 0
    first = capsys.readouterr()
    assert "2 fits are there" in first.out
    assert first.err.count("fitting low-rank predictors of d-countdown 0.5, s-countdown 0.5") == 1
    files = sorted((tmp_path / "r" / "fits").iterdir())
    assert len(files) == 2
    times = [path.stat().st_mtime_ns for path in files]
    assert main([*command, "--activation-budget-gib", "4"]) == 0
    assert main(["run", *command[1:], "--no-fit", "--out", str(tmp_path / "out")]) == 0
    assert [path.stat().st_mtime_ns for path in files] == times
    assert "fitting low-rank" not in capsys.readouterr().err
    assert main([*command, "--rank", "3", "--seed", "2"]) == 0
    assert len(list((tmp_path / "r" / "fits").iterdir())) == 4


def refused(command: list[str], capsys, *texts: str, code: int = 2) -> None:
    assert main(command) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert all(text in line for text in texts), err


@pytest.mark.parametrize(
    ("predictor", "texts"),
    [
        ({"ranks": [17]}, ["rank 17", "d_model 16"]),
        ({"max_tokens": 40}, ["tokens to train a predictor on; give at least 64"]),
        ({"sources": ["train:truthfulqa_mc1"]}, ["task truthfulqa_mc1 has no train split"]),
        ({"sources": ["train:nothing"]}, ["no train split"]),
        ({"activation_budget_gib": 1e-9}, ["more than the activation budget", "--activation-budget-gib"]),
        ({"activation_budget_gib": 0}, ["predictor.activation_budget_gib", "got 0"]),
        ({"loss": "bcee"}, ["predictor.loss", "'bcee'"]),
        ({"epochs": 0, "start": "random"}, ["epochs 0"]),
    ],
)
def test_bad_settings_are_one_line(world, tmp_path, capsys, predictor, texts):
    file = written(tmp_path, predictors(world, **predictor))
    refused(["fit", file, "--results", str(tmp_path / "r")], capsys, *texts)


def test_text_that_is_evaluated_is_refused(world, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(world / "data", data)
    row = json.loads((data / "arc_easy" / "test.jsonl").read_text().splitlines()[0])
    (data / "arc_easy" / "test.jsonl").write_text(json.dumps(row | {"question": PARAGRAPH}))
    texts = [PARAGRAPH.upper(), "something else"]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = predictors(world) | {"data_dir": str(data)}
    own = ["--calibration", f"file:{tmp_path / 'own.jsonl'}"]
    command = ["check", written(tmp_path, config), "--results", str(tmp_path / "r")]
    refused([*command, *own], capsys, "1 of its paragraphs", "scored documents of task arc_easy", "fit on another text")
    assert main([*command, "--calibration", "train:arc_easy,piqa"]) == 0


def test_damaged_artifacts_and_those_of_another_model_are_refused(world, tmp_path, capsys):
    file = written(tmp_path, predictors(world))
    command = ["run", file, "--results", str(tmp_path / "r"), "--out", str(tmp_path / "out")]
    assert main(["fit", *command[1:4]]) == 0
    (fit,) = (tmp_path / "r" / "fits").iterdir()
    whole = fit.read_bytes()
    fit.write_bytes(whole[:-9])
    refused(command, capsys, "is damaged", "delete it and fit anew")
    other = written(tmp_path, predictors(world, "tiny-qwen2"), "other.yaml")
    assert main(["fit", other, "--results", str(tmp_path / "s")]) == 0
    (foreign,) = (tmp_path / "s" / "fits").iterdir()
    fit.write_bytes(foreign.read_bytes())
    capsys.readouterr()
    refused(command, capsys, "has key", "inside")


def test_nan_loss_is_a_failed_cell_and_names_the_layer(world, tmp_path, capsys, monkeypatch):
    from suite.fitting import predictor as module

    real = module.train

    def broken(x, jobs, layers, *rest):
        real(x * float("nan") if 1 in layers else x, jobs, layers, *rest)

    monkeypatch.setattr(module, "train", broken)
    file = written(tmp_path, predictors(world))
    assert main(["run", file, "--results", str(tmp_path / "r"), "--out", str(tmp_path / "out")]) == 1
    (failed,) = [row for row in rows(tmp_path / "out") if row["status"] == "failed"]
    assert "loss of the predictor of layer 1 is NaN" in failed["reason"]
    assert len(list((tmp_path / "r" / "fits").glob("partial-*/round-1-layer-000*"))) == 1


def test_predictor_options_are_in_the_key_and_the_budget_is_not():
    def keys(**predictor):
        block = {"methods": ["d-countdown"], "modes": ["practical"], "sparsities": [0.5], "tasks": ["t1"]}
        config = matrix(models=[{"id": "a"}], accuracy=[block], predictor=predictor)
        return [cell.key for cell in expand(config, FakeWorld())]

    base = keys()
    assert keys(activation_budget_gib=3.0) == base
    for changed in ({"epochs": 7}, {"loss": "bce"}, {"rounds": 1}, {"ranks": [9]}, {"predictors": ["ternary"]}):
        assert keys(**changed) != base
    with pytest.raises(InputError, match="predictor: unknown key 'rank'; did you mean 'ranks'"):
        build_config({"name": "x", "models": [{"id": "a"}], "predictor": {"rank": 3}}, "test")
    assert TorchWorker(activation_budget_gib=1.0)
