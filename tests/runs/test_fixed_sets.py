"""Methods with a fixed set, with a factor of a rank and with gated predictors, through the command line."""

import csv

import pytest

from suite.cli import main
from suite.methods.cost import gated_share
from tests.runs.test_end_to_end import rows, world, written

__all__ = ["world"]  # the fixture


def config(world, **more):
    return {
        "name": "small",
        "models": [{"id": str(world / "tiny-llama")}],
        "device": "cpu",
        "data_dir": str(world / "data"),
        "calibration": {"max_tokens": 512},
        **more,
    }


def run(tmp_path, matrix):
    command = ["run", written(tmp_path, matrix), "--results", str(tmp_path / "r"), "--out", str(tmp_path / "out")]
    return main(command)


def test_rows_of_methods_with_and_without_a_fit(world, tmp_path):
    block = {"modes": ["practical"], "sparsities": [0.5], "tasks": ["arc_easy"]}
    md = [
        {"name": "md-countdown", "params": {"rank": rank, "exact": exact}} for rank, exact in ((3, "auto"), (4, "gate"))
    ]
    inputs = {
        "predictors": ["gated"],
        "ranks": [3],
        "rounds": 1,
        "max_tokens": 512,
        "predictor_inputs": ["mlp", "block"],
    }
    blocks = [block | {"methods": ["dense", "static", "griffin", *md, "d-countdown"]}]
    assert run(tmp_path, config(world, predictor=inputs, accuracy=blocks)) == 0
    found = [row for row in rows(tmp_path / "out") if row["metric"] == "acc"]
    assert {row["status"] for row in found} == {"ok"}
    names = ("method", "mode", "estimator", "predictor", "rank", "predictor_input", "exact_projection")
    settings = sorted(tuple(row[name] for name in names) for row in found)
    chosen = {row["exact_projection"]: row["exact_chosen"] for row in found}
    assert chosen.pop("auto") in ("up", "gate")  # the setting is that of the key, whatever the fit chose
    assert chosen == {"gate": "gate", "": ""}
    assert settings == sorted(
        [
            ("dense", "none", "", "", "", "", ""),
            ("static", "practical", "", "", "", "", ""),
            ("griffin", "practical", "", "", "", "", ""),
            ("md-countdown", "practical", "calibrated", "", "3", "mlp", "auto"),
            ("md-countdown", "practical", "calibrated", "", "4", "mlp", "gate"),
            *(("d-countdown", "practical", "calibrated", "gated", "3", read, "") for read in ("mlp", "block")),
        ]
    )
    for row in found:
        realised, share = float(row["sparsity_realized"]), float(row["bytes_share"])
        if row["method"] in ("static", "griffin"):
            assert share == pytest.approx(1 - realised)
            assert realised == pytest.approx(0.5)
        if row["method"] == "d-countdown":
            assert share == pytest.approx(1 - realised + gated_share(3, 2, 16, 40, "float32"))
        if row["rank"] == "4":  # two matrices of fp32, and a number a neuron, beside 3 x 16 x 40
            assert share == pytest.approx((3 - 2 * realised) / 3 + (4 * (16 + 40) + 40) / (3 * 16 * 40))
    with (tmp_path / "out" / "predictor.csv").open() as file:
        assert {row["predictor_input"] for row in csv.DictReader(file)} == {"mlp", "block"}
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("method", "predictor", "match"),
    [
        ({"name": "md-countdown", "params": {"rank": 0}}, {}, "rank 0 of method md-countdown"),
        ({"name": "md-countdown", "params": {"exact": "down"}}, {}, "exact 'down' of method md-countdown"),
        ({"name": "md-countdown", "params": {"predictor_input": "x"}}, {}, "predictor_input 'x'"),
        ("d-countdown", {"predictors": ["gatd"]}, "gated"),
        ("d-countdown", {"predictor_inputs": ["blok"]}, "block"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(world, tmp_path, capsys, method, predictor, match):
    block = {"methods": [method], "modes": ["practical"], "sparsities": [0.5], "tasks": ["arc_easy"]}
    assert run(tmp_path, config(world, predictor=predictor, accuracy=[block])) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert match in said[0]


@pytest.mark.parametrize(
    ("method", "predictor", "match"),
    [
        (
            {"name": "md-countdown", "params": {"rank": 17}},
            {},
            "rank 17 of its factor of 'gate' must be 1 to d_model=16",
        ),
        (
            "d-countdown",
            {"predictors": ["gated"], "ranks": [17]},
            "rank 17 of a predictor is above the model's d_model 16",
        ),
        (
            "dejavu",
            {"predictors": ["gated"], "ranks": [3]},
            "method 'dejavu' has no practical mode with predictors gated",
        ),
    ],
)
def test_what_shows_in_the_fit_alone_is_one_line_and_exit_2_too(world, tmp_path, capsys, method, predictor, match):
    block = {"methods": ["dense", method], "modes": ["practical"], "sparsities": [0.5], "tasks": ["arc_easy"]}
    assert run(tmp_path, config(world, predictor=predictor, accuracy=[block])) == 2
    assert match in capsys.readouterr().err.strip().splitlines()[-1]
