"""The whole report of a realistic run, of unfinished ones, and the check that it follows from the files."""

import hashlib
import itertools
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite.errors import InputError
from suite.report import style
from suite.report.figures import FIGURES
from suite.report.page import report_of, write_report
from suite.report.rebuild import rebuild_problems
from suite.report.results import load_results
from suite.runs.view.manifest import file_hashes
from tests.report.parts import OF_ONE_MODEL, figure, material
from tests.report.synthetic import accuracy_row, hand_run, hits, manifest, speed_rows, write_run

DENSE = ("dense", "none", 0.0, 0.0)


@pytest.fixture
def copy(reported, tmp_path):
    return shutil.copytree(reported, tmp_path / "copy")


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def test_every_part_is_there(reported):
    page = (reported / "REPORT.md").read_text()
    headings = ("In short", "Where the methods come from", "Claims of the abstract", "Figures", "Tables")
    for heading in (*headings, "Failed and skipped", "Provenance"):
        assert f"## {heading}" in page
    assert "smoke-level instrument" in page
    assert "out of domain" in page
    assert "no CUDA device" in page
    for target in re.findall(r"\]\(([^)]+)\)", page):
        assert (reported / target).is_file(), target
    assert {p.stem for p in (reported / "figures").glob("*.png")} == {one.name for one in OF_ONE_MODEL}
    assert len(load_results(reported).claims) > 20
    assert not re.search(r"\bnan\b", page)


def test_the_report_follows_from_the_files(reported):
    assert rebuild_problems(reported) == []


def test_what_was_changed_by_hand_is_found(copy):
    claims = pd.read_csv(copy / "claims.csv", dtype=str, keep_default_na=False)
    claims.loc[claims["value"] != "", "value"] = "0.9"
    claims.to_csv(copy / "claims.csv", index=False)
    table = copy / "tables" / "accuracy.md"
    table.write_text(table.read_text().replace("| dense | 0 |", "| dense | 1 |"))
    (copy / "figures" / "quality_vs_bytes.png").unlink()
    (copy / "figures" / "sparsity_per_layer.csv").unlink()
    problems = "\n".join(rebuild_problems(copy))
    assert re.search(r"claims\.csv: .* column value: '0.9', expected", problems)
    assert "tables/accuracy.md: is not what the run's CSVs give" in problems
    assert "figures/quality_vs_bytes.csv: has no .png" in problems
    assert "figures/sparsity_per_layer.csv: is missing" in problems
    assert len(problems.splitlines()) == 4


def test_a_changed_value_in_the_csv_shows_in_the_report(copy):
    frame = pd.read_csv(copy / "accuracy.csv", dtype=str, keep_default_na=False)
    frame.loc[0, "value"] = "0.999"
    frame.to_csv(copy / "accuracy.csv", index=False)
    assert any(problem.startswith("tables/") for problem in rebuild_problems(copy))


def test_figures_are_the_same_bytes_each_time(reported, tmp_path):
    data = pd.read_csv(reported / "figures" / "sparsity_per_layer.csv")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        drawn = figure("sparsity_per_layer").drawn(data)
        style.save(drawn, tmp_path / name / "figure")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert b"<dc:date>" not in (tmp_path / "a" / "figure.svg").read_bytes()


def test_dense_stands_once_in_the_figures_data(reported):
    for name in ("quality_vs_sparsity", "quality_per_task", "perplexity_vs_sparsity"):
        data = pd.read_csv(reported / "figures" / f"{name}.csv")
        assert not data.drop(columns=["value"]).duplicated().any()
    averages = pd.read_csv(reported / "figures" / "quality_vs_sparsity.csv")
    assert len(averages) == 28
    assert (averages["method"] == "dense").sum() == 1


def test_sparsity_per_layer_is_weighted_by_tokens(tmp_path):
    rows = [accuracy_row("cats", t, "acc", 0.5, mode="practical", cell_id=t) for t in ("a", "b")]
    layers = [
        {"cell_id": cell, "layer": 0, "sparsity_target": 0.8, "sparsity_realized": value, "n_tokens": n}
        for cell, value, n in (("a", 0.9, 100), ("b", 0.7, 300))
    ]
    data = figure("sparsity_per_layer").frame(material(write_run(tmp_path, rows, sparsity=layers, manifest=manifest())))
    assert data["sparsity_realized"].tolist() == [pytest.approx(0.75)]


def test_sparsity_per_layer_has_a_line_for_each_site(tmp_path):
    layers = [
        {"cell_id": "a", "layer": 0, "site": site, "sparsity_target": 0.8, "sparsity_realized": value, "n_tokens": 9}
        for site, value in (("mlp.neurons", 0.9), ("mlp.input", 0.7))
    ]
    rows = [accuracy_row("cats", "a", "acc", 0.5, mode="practical", cell_id="a")]
    data = figure("sparsity_per_layer").frame(material(write_run(tmp_path, rows, sparsity=layers, manifest=manifest())))
    found = dict(zip(data["label"], data["sparsity_realized"], strict=True))
    assert found == {"cats": pytest.approx(0.9), "cats mlp.input": pytest.approx(0.7)}


@pytest.mark.parametrize("part", ["nothing", "speed", "missing", "dense", "all sparse failed", "no manifest"])
def test_unfinished_runs_are_reported(tmp_path, part):
    if part == "nothing":
        run = write_run(tmp_path, manifest=manifest())
    elif part == "speed":
        run = write_run(tmp_path, speed=speed_rows(), manifest=manifest())
    elif part == "missing":
        row = accuracy_row("cats", "pack_grammar", "", "", status="missing", reason="not run yet", chance="")
        run = write_run(tmp_path, [row], [], manifest=manifest())
    elif part == "dense":
        run = hand_run(tmp_path, {DENSE: {"pack_grammar": hits(50)}})
    elif part == "all sparse failed":  # the first thing that the author of a method may meet
        failed = {"status": "failed", "reason": "RuntimeError: my bug", "sparsity_target": 0.8, "chance": ""}
        rows = [
            accuracy_row("dense", "pack_grammar", "acc", 0.9, mode="none", sparsity_target=0, sparsity_realized=0),
            accuracy_row("cats", "pack_grammar", "", "", mode="ideal", **failed),
            accuracy_row("dense", "decode_perplexity", "perplexity", 20.0, mode="none", sparsity_target=0),
            accuracy_row("cats", "decode_perplexity", "", "", mode="ideal", **failed),
        ]
        run = write_run(tmp_path, rows, manifest=manifest())
    else:
        run = hand_run(tmp_path, {("cats", "ideal", 0.8, 0.8): {"a": hits(9)}, DENSE: {"a": hits(50)}})
        (run / "manifest.json").unlink()
    page = write_report(run).read_text()
    assert rebuild_problems(run) == []
    expected = {
        "nothing": "Cells: none yet.",
        "speed": "Speed, llama-3.1-8b",
        "missing": "1 missing. The run is not finished",
        "dense": "1 ok",
        "all sparse failed": "RuntimeError: my bug",
        "no manifest": "There is no manifest.json",
    }
    assert expected[part] in page


def test_a_value_that_is_not_finite_is_no_number(tmp_path):
    rows = [accuracy_row("dense", "a", "acc", 0.9), accuracy_row("cats", "a", "acc", "nan")]
    page = write_report(write_run(tmp_path, rows, manifest=manifest())).read_text()
    assert not re.search(r"\bnan\b", page)


def test_an_earlier_reports_leftovers_go_and_other_files_stay(copy):
    listed = json.loads((copy / "manifest.json").read_text()) | {"files": file_hashes(copy)}
    (copy / "manifest.json").write_text(json.dumps(listed))
    (copy / "speed.csv").unlink()
    (copy / "figures" / "mine.png").write_bytes(b"")
    (copy / "tables" / "seeds.md").write_text("of a user, not listed")
    write_report(copy)
    assert not list(copy.glob("figures/speedup_vs_sparsity.*"))
    assert not (copy / "tables" / "speed.md").exists()
    assert (copy / "figures" / "mine.png").exists()
    strangers = ["figures/mine.png: is not part of the report"]
    if "of a user" in (copy / "tables" / "seeds.md").read_text():  # a run with several seeds writes its own
        strangers.append("tables/seeds.md: is not part of the report")
    assert rebuild_problems(copy) == strangers


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    run = hand_run(tmp_path, {DENSE: {"a": hits(50)}})
    (run / "tables").write_text("in the way")
    with pytest.raises(InputError, match="cannot write the report into"):
        write_report(run)


def test_losses_are_listed_as_plainly_as_wins(tmp_path):
    answers = {
        DENSE: {"pack_last_word": hits(90)},
        ("cats", "ideal", 0.8, 0.8): {"pack_last_word": hits(80)},
        ("m-countdown", "ideal", 0.8, 0.8): {"pack_last_word": hits(50)},
    }
    page = write_report(hand_run(tmp_path, answers)).read_text()
    line = next(line for line in page.splitlines() if line.startswith("| m-countdown against cats"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["0", "1", "0"]
    assert cells[4].startswith("pack_last_word ideal 0.8 -30.0 [")


def test_measured_speed_up_stands_beside_quality_only_for_the_same_model(reported, tmp_path):
    data = pd.read_csv(reported / "figures" / "quality_vs_bytes.csv")
    measured = data[data["quantity"].str.startswith("speed-up")]
    assert set(measured["method"]) == {"cats", "m-countdown", "given"}
    assert len(measured) == 14  # the embedded shape, not the Llama one: 12 rows of a layer, 2 of decoding
    run = shutil.copytree(reported, tmp_path / "copy")
    config = manifest(config={"models": [{"id": "owner/other"}]})
    write_run(run, manifest=config)
    found = figure("quality_vs_bytes").frame(material(run))
    named = found[found["quantity"].str.startswith("speed-up")]
    assert set(named["quantity"]) == {"speed-up, decode"}  # these rows name their model themselves


def test_of_several_scopes_the_long_figures_show_scored(tmp_path):
    answers = {("dense", "none", 0.0, 0.0): {"a": hits(80)}}
    answers |= {("cats", "ideal", 0.8, 0.8, scope): {"a": hits(60)} for scope in ("paper", "scored")}
    run = material(hand_run(tmp_path, answers))
    scopes = {one.name: set(one.frame(run)["scope"]) for one in FIGURES if "quality" in one.name}
    assert scopes.pop("quality_vs_sparsity") == {"paper", "scored"}
    assert set(scopes) == {"quality_per_task", "quality_vs_bytes"}
    assert all(found == {"scored"} for found in scopes.values())


@given(places=st.lists(st.floats(0, 1), max_size=12), gap=st.floats(0.01, 0.2))
def test_labels_are_pushed_apart_and_keep_their_order(places, gap):
    moved = style.spread(sorted(places), gap)
    assert len(moved) == len(places)
    assert all(b - a >= gap * (1 - 1e-9) for a, b in itertools.pairwise(moved))
    assert np.mean(moved or [0]) == pytest.approx(np.mean(sorted(places) or [0]), abs=1e-9)


@pytest.mark.parametrize(("in_domain", "warned"), [({}, True), ({"pydoc": False}, True), ({"pydoc": True}, False)])
def test_out_of_domain_fits_are_said_unless_the_manifest_knows_better(copy, in_domain, warned):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"in_domain": in_domain}))
    assert ("fitted out of domain" in report_of(material(copy)).texts["REPORT.md"]) is warned
