"""Table and figure of trained predictors."""

import dataclasses

from suite.report.material import Material
from suite.report.results import load_results
from tests.report.parts import figure, material, table_text
from tests.report.synthetic import embedded_run


def test_means_over_layers_with_time_and_domain(tmp_path):
    results = load_results(embedded_run(tmp_path / "run"))
    accuracy = results.accuracy.copy()
    practical = accuracy.index[accuracy["mode"] == "practical"][:1]
    accuracy.loc[practical, ["fit_id", "calibration"]] = ["d-countdown-0.8", "train:arc"]
    manifest = {**results.manifest, "in_domain": {"train:arc": True}}
    table = table_text(Material(dataclasses.replace(results, accuracy=accuracy, manifest=manifest)), "predictors")
    (line,) = [line for line in table.splitlines() if "d-countdown 0.8" in line]
    assert "low-rank 288 | train:arc (in domain)" in line
    # mean of .74 and .64; a quarter of a second a layer
    assert "| 0.796 | 0.600 | 0.610 | 0.590 | 0.690 | 0.900 | 6144 | 0.5 | 1762 |" in line
    assert len([line for line in table.splitlines() if "low-rank" in line]) == 4


def test_figure_shows_the_sparsity_nearest_to_80_percent(tmp_path):
    data = figure("predictors").frame(material(embedded_run(tmp_path / "run")))
    assert set(data["sparsity_target"]) == {0.8}
    assert data[["method", "layer", "mass_kept"]].values.tolist() == [
        ["d-countdown", 0, 0.74],
        ["d-countdown", 1, 0.64],
        ["dejavu", 0, 0.5],
        ["dejavu", 1, 0.4],
    ]
