"""Fits beside the main ones: their rows stay out of the main tables and stand in tables of their own."""

import json

import pandas as pd
import pytest

from suite.report.tables.fits import text_name
from tests.report.parts import quality, table_text
from tests.report.synthetic import hand_run, hits, manifest
from tests.report.test_comparisons import lines_of

C4 = "file:{data_dir}/calibration/c4.jsonl.gz"
TRAIN = "train:{data_dir}/arc_easy,{data_dir}/piqa"
IN_DOMAIN = {C4: False, TRAIN: True}


@pytest.fixture
def run(tmp_path):
    """d-countdown practical by three seeds and on two texts; piqa only by the main fit and on the train splits."""
    setting = ("d-countdown", "practical", 0.8, 0.8)
    answers = {
        ("dense", "none", 0.0, 0.0): {"arc_easy": hits(90), "piqa": hits(80), "decode_perplexity": [2.0] * 50},
        ("random", "ideal", 0.8, 0.8): {"arc_easy": hits(25), "piqa": hits(50)},
        setting: {"arc_easy": hits(50), "piqa": hits(60), "decode_perplexity": [3.0 + 0.01 * i for i in range(50)]},
    }
    folder = hand_run(tmp_path / "run", answers)
    frame = pd.read_csv(folder / "accuracy.csv", dtype=str, keep_default_na=False)
    own = frame["method"] == "d-countdown"
    frame.loc[own, "calibration"] = C4
    beside = [
        frame[own & (frame["task"] != "piqa")].assign(seed="1", cell_id=lambda f: f["cell_id"] + "-1"),
        frame[own & (frame["task"] != "piqa")].assign(seed="2", cell_id=lambda f: f["cell_id"] + "-2"),
        frame[own].assign(calibration=TRAIN, cell_id=lambda f: f["cell_id"] + "-t"),
    ]
    for number, more in enumerate(beside):
        more.loc[more["task"] == "arc_easy", "value"] = ["0.4", "0.6", "0.7"][number]
        more.loc[more["task"] == "decode_perplexity", "value"] = ["20", "30", "15"][number]
    pd.concat([frame, *beside]).to_csv(folder / "accuracy.csv", index=False)
    samples = pd.read_csv(folder / "samples.csv.gz", dtype=str, keep_default_na=False)
    trained = samples[samples["cell_id"].str.startswith("d-countdown")].assign(cell_id=lambda f: f["cell_id"] + "-t")
    for task, answer in (("arc_easy", hits(70)), ("piqa", hits(60))):
        trained.loc[trained["task"] == task, "value"] = list(map(str, answer))
    pd.concat([samples, trained]).to_csv(folder / "samples.csv.gz", index=False)
    config = {"name": "x", "seeds": [0], "calibration": {"source": C4}, "predictor": {"sources": []}, "models": []}
    (folder / "manifest.json").write_text(json.dumps(manifest(config=config, in_domain=IN_DOMAIN)))
    return folder


def test_main_tables_hold_the_main_fits_alone(run):
    found = quality(run)
    assert list(found.summary.loc[found.summary["method"] == "d-countdown", "label"]) == ["d-countdown"] * 2
    assert len(found.every) == len(found.rows) + 2 + 2 + 3
    (practical,) = [settings for block, settings in found.summary_blocks if block["mode"] == "practical"]
    assert [one.label for one in practical] == ["dense", "random", "d-countdown"]


def test_without_a_manifest_every_row_is_a_main_one(run):
    (run / "manifest.json").unlink()
    found = quality(run)
    assert len(found.rows) == len(found.every)


def test_spread_over_seeds_is_over_the_tasks_that_all_seeds_have(run):
    average, text = lines_of(table_text(run, "seeds"), "d-countdown")
    assert average[2:] == ["scored", "practical", "0.8", "average of 1 tasks, %", "3", "50.0", "10.0", "40.0", "60.0"]
    assert text[5:7] == ["decode_perplexity perplexity", "3"]


def test_texts_are_compared_on_the_same_documents(run):
    table = table_text(run, "calibration")
    outside, inside, difference = lines_of(table.partition("decode")[0], "d-countdown")
    assert outside[2:] == ["c4", "0.800", "50.0", "60.0", "55.0"]
    assert inside[2:] == ["train splits", "0.800", "70.0", "60.0", "65.0"]
    assert difference[2] == "difference"
    assert difference[4].startswith("+20.0 [+1")
    assert difference[5] == "+0.0 [+0.0, +0.0]"
    assert difference[6].startswith("+10.0 [+")
    assert lines_of(table.partition("decode")[2], "d-countdown")[1][4] == "15.0"


def test_without_variants_there_are_no_such_tables(tmp_path):
    answers = {
        ("dense", "none", 0.0, 0.0): {"arc_easy": hits(90)},
        ("cats", "practical", 0.8, 0.8): {"arc_easy": hits(50)},
    }
    run = hand_run(tmp_path, answers)
    assert table_text(run, "seeds") == table_text(run, "calibration") == ""


def test_names_of_texts():
    assert text_name(C4, in_domain=False) == "c4"
    assert text_name("pydoc", in_domain=False) == "pydoc"
    assert text_name(TRAIN, in_domain=True) == "train splits"
