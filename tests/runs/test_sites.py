"""Methods on the inputs of projections, and ones that ask for calibration or the prompt, through the command line."""

import pytest

from suite.cli import main
from tests.runs.test_end_to_end import rows, world, written
from tests.runs.test_predictor_cells import csv_rows

__all__ = ["world"]  # the fixture
OWN = "tests.modeling.site_methods:"


def test_a_run_of_methods_beyond_neurons(world, tmp_path):
    block = {"methods": ["dense"], "sparsities": [0.5], "tasks": ["arc_easy"]}
    both = block | {"methods": [OWN + "Teal", OWN + "Chess"], "modes": ["ideal", "practical"]}
    config = {
        "name": "small",
        "models": [{"id": str(world / "tiny-llama")}],
        "device": "cpu",
        "data_dir": str(world / "data"),
        "calibration": {"max_tokens": 512, "estimators": ["calibrated", "mean-kth"]},
        "accuracy": [block, both, block | {"methods": [OWN + "Griffin"]}],
    }
    command = ["run", written(tmp_path, config), "--results", str(tmp_path / "r"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    found = [row for row in rows(tmp_path / "out") if row["metric"] == "acc"]
    assert {row["status"] for row in found} == {"ok"}
    settings = sorted((row["method"].removeprefix(OWN), row["mode"], row["estimator"]) for row in found)
    assert settings == [
        ("Chess", "ideal", "calibrated"),
        *(("Chess", "practical", name) for name in ("calibrated", "mean-kth")),
        ("Griffin", "ideal", ""),
        ("Teal", "ideal", ""),
        *(("Teal", "practical", name) for name in ("calibrated", "mean-kth")),
        ("dense", "none", ""),
    ]
    layers = csv_rows(tmp_path / "out" / "sparsity.csv")
    for row in found:
        own = [layer for layer in layers if layer["cell_id"] == row["cell_id"]]
        shares = {}
        for layer in own:
            shares.setdefault(layer["site"], []).append(float(layer["sparsity_realized"]))
        realised = {site: sum(values) / len(values) for site, values in shares.items()}
        method = row["method"].removeprefix(OWN)
        if method == "dense":
            continue
        assert list(realised) == (["mlp.input", "mlp.neurons"] if method == "Teal" else ["mlp.neurons"])
        kept = {site: 1 - share for site, share in realised.items()}
        expected = {
            "Teal": (2 * kept.get("mlp.input", 1) + kept["mlp.neurons"]) / 3,
            "Chess": (1 + 2 * kept["mlp.neurons"]) / 3 + 1 / (3 * 16),  # a number a neuron beside 3 rows of d_model
            "Griffin": kept["mlp.neurons"],
        }
        assert float(row["bytes_share"]) == pytest.approx(expected[method])
    assert main(["verify", str(tmp_path / "out")]) == 0
