"""Claims: arithmetic, verdicts, what stays untested."""

import pytest

from suite.report.claims import PAPER_MODELS, make_claims
from suite.report.figures.tradeoff import is_shape_of
from suite.report.results import load_results
from tests.report.parts import material
from tests.report.synthetic import MODEL, hand_run, hits, manifest, speed_row, write_run

DENSE = ("dense", "none", 0.0, 0.0)


def claims(folder):
    run = material(folder)
    return make_claims(run.quality, run.speed)


def pick(frame, **wanted):
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1, frame
    return frame.iloc[0]


def test_c1_is_the_relative_loss_of_the_average(tmp_path):
    answers = {
        DENSE: {"a": hits(90), "b": hits(70)},
        ("d-countdown", "ideal", 0.9, 0.9): {"a": hits(84), "b": hits(68)},
    }
    frame = claims(hand_run(tmp_path, answers))
    row = pick(frame, claim="C1", model=MODEL, quantity="relative_loss_of_average")
    assert row["value"] == pytest.approx(1 - 0.76 / 0.80)
    assert row["ci_low"] < row["value"] < row["ci_high"]
    assert row["verdict"] == "consistent"
    assert "not settled" in row["reason"]
    strict = pick(frame, claim="C1", model=MODEL, quantity="relative_loss_above_chance")
    assert strict["value"] == pytest.approx(1 - (0.59 / 0.65 + 0.43 / 0.45) / 2)
    assert strict["verdict"] == "inconsistent here"


def test_c1_in_practical_mode_says_so_and_what_it_realises(tmp_path):
    answers = {
        DENSE: {"a": hits(90)},
        ("d-countdown", "ideal", 0.9, 0.9): {"a": hits(88)},
        ("d-countdown", "practical", 0.9, 0.87): {"a": hits(60)},
    }
    frame = claims(hand_run(tmp_path, answers))
    wanted = {"claim": "C1", "model": MODEL, "quantity": "relative_loss_of_average"}
    row = pick(frame, **wanted, mode="practical")
    assert (row["value"], row["verdict"]) == (pytest.approx(1 / 3), "inconsistent here")
    assert "practical: the abstract's figure is ideal, realised sparsity 0.870 instead of 0.9" in row["reason"]
    ideal = pick(frame, **wanted, mode="ideal")
    assert ideal["verdict"] == "consistent"
    assert "practical" not in ideal["reason"]


def test_c2_compares_retention_as_difference_and_ratio_with_every_baseline(tmp_path):
    answers = {
        DENSE: {"a": hits(80)},
        **{("m-countdown", "ideal", s, s): {"a": hits(n)} for s, n in ((0.7, 72), (0.8, 64), (0.9, 30))},
        **{("cats", "ideal", s, s): {"a": hits(n)} for s, n in ((0.7, 70), (0.8, 40), (0.9, 36))},
        **{("dejavu-abs", "ideal", s, s): {"a": hits(n)} for s, n in ((0.7, 72), (0.8, 64), (0.9, 60))},
    }
    frame = claims(hand_run(tmp_path, answers))
    cats = {"claim": "C2", "model": MODEL, "against": "cats"}
    row = pick(frame, **cats, quantity="retention_difference", sparsity_target=0.8)
    assert row["value"] == pytest.approx((64 - 40) / 80)
    assert row["verdict"] == "consistent"
    assert "excludes no difference" in row["reason"]
    assert pick(frame, **cats, quantity="retention_ratio_minus_1", sparsity_target=0.8)["value"] == pytest.approx(0.6)
    worse = pick(frame, **cats, quantity="retention_difference", sparsity_target=0.9)
    assert worse["value"] == pytest.approx(-6 / 80)
    assert worse["verdict"] == "inconsistent here"
    best = pick(frame, **cats, quantity="best_case_retention_difference")
    assert (best["sparsity_target"], best["value"]) == (0.8, pytest.approx(0.3))
    assert best["verdict"] == "consistent"
    assert "best case over 3 sparsities" in best["reason"]
    other = pick(frame, claim="C2", model=MODEL, against="dejavu-abs", quantity="best_case_retention_difference")
    assert other["value"] == 0
    assert other["verdict"] == "inconsistent here"
    signed = pick(frame, claim="C2", model=MODEL, against="dejavu")
    assert (signed["verdict"], signed["reason"]) == ("untested", "not in this run, or not finished")


def test_practical_pairs_of_unequal_sparsity_are_no_best_case(tmp_path):
    answers = {
        DENSE: {"a": hits(80)},
        ("m-countdown", "practical", 0.8, 0.76): {"a": hits(70)},
        ("cats", "practical", 0.8, 0.80): {"a": hits(30)},
    }
    frame = claims(hand_run(tmp_path, answers))
    row = pick(frame, claim="C2", model=MODEL, against="cats", quantity="retention_difference")
    assert "unequal realised sparsity (0.760 against 0.800)" in row["reason"]
    assert not frame["quantity"].str.startswith("best_case").any()


def test_c3_is_the_speed_up_over_the_fastest_dense(tmp_path):
    speed = [
        speed_row("dense", 0.0, 100.0),
        speed_row("dense", 0.0, 80.0, variant="compile"),
        speed_row("m-countdown", 0.9, 40.0),
        speed_row("d-countdown", 0.9, 160.0, rank=512),
        speed_row("cats", 0.9, 10.0),
    ]
    frame = claims(write_run(tmp_path, speed=speed, manifest=manifest()))
    row = pick(frame, claim="C3", method="m-countdown")
    assert row["value"] == 2.0
    assert (row["against"], row["verdict"]) == ("dense (torch compile, wall)", "consistent")
    slow = pick(frame, claim="C3", method="d-countdown (r=512)")
    assert (slow["value"], slow["verdict"]) == (0.5, "inconsistent here")


def test_an_unfinished_dense_average_leaves_claims_untested(tmp_path):
    answers = {DENSE: {"a": hits(80)}, ("d-countdown", "ideal", 0.9, 0.9): {"a": hits(79), "b": hits(10)}}
    answers[DENSE]["b"] = hits(20)
    run = hand_run(tmp_path, answers)
    text = (run / "accuracy.csv").read_text().splitlines()
    (run / "accuracy.csv").write_text("\n".join(line for line in text if "dense-none-0.0-b" not in line) + "\n")
    row = pick(claims(run), claim="C1", model=MODEL)
    assert row["verdict"] == "untested"


def test_the_papers_models_stay_untested(tmp_path):
    frame = claims(hand_run(tmp_path, {DENSE: {"a": hits(80)}, ("cats", "ideal", 0.8, 0.8): {"a": hits(70)}}))
    for model in PAPER_MODELS:
        rows = frame[frame["model"] == model]
        assert set(rows["claim"]) == {"C1", "C2", "C3"}
        assert set(rows["verdict"]) == {"untested"}
        assert rows["value"].isna().all()


def test_keeping_as_much_is_not_better(tmp_path):
    answers = {
        DENSE: {"a": hits(80)},
        ("m-countdown", "ideal", 0.8, 0.8): {"a": hits(60)},
        ("cats", "ideal", 0.8, 0.8): {"a": hits(60)},
    }
    row = pick(claims(hand_run(tmp_path, answers)), model=MODEL, against="cats", quantity="retention_difference")
    assert (row["value"], row["verdict"]) == (0, "inconsistent here")
    assert "keeps as much as cats" in row["reason"]


def test_a_papers_model_with_its_owner_in_the_name_is_that_model(tmp_path):
    run = hand_run(tmp_path, {DENSE: {"a": hits(80)}, ("cats", "ideal", 0.8, 0.8): {"a": hits(70)}})
    path, name = run / "accuracy.csv", "google/gemma-2-9b-it"
    path.write_text(path.read_text().replace(MODEL, name))
    models = set(claims(run)["model"])
    assert name in models
    assert "gemma-2-9b-it" not in models
    assert is_shape_of(load_results(run), "gemma-2-9b", name)
