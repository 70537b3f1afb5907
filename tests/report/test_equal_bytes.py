"""Methods at equal bytes: interpolation, intervals, what is not reached; loss against size; the suite's own expectations."""

import math

import numpy as np
import pandas as pd
import pytest

from suite.report.equal_bytes import AVERAGE, LEVELS, SPEED_UP
from suite.report.expectations import ORDER, checked
from suite.report.page import write_report
from suite.report.results import load_results
from suite.schema import EQUAL_BYTES
from suite.statistics import paired_delta
from tests.report.parts import figure, material, table_text
from tests.report.synthetic import MODEL, hand_run, hits, speed_row

DENSE = ("dense", "none", 0.0, 0.0)
TEXT = "decode_perplexity"
RNG = np.random.default_rng(0)
NATS = RNG.normal(3, 0.3, 50)
NOISE = {s: RNG.normal(0.1, 0.1, 50) for s in (0.5, 0.7)}


def practical(method, sparsity):
    return (method, "practical", sparsity, sparsity)


def two_settings(folder, **more):
    """cats at 30 and 50 % of the bytes (1 - sparsity, in hand-made runs), griffin at 45 % alone."""
    answers = {
        DENSE: {"a": hits(90), "b": hits(80), TEXT: list(NATS)},
        practical("cats", 0.7): {"a": hits(50), "b": hits(60), TEXT: list(NATS + 1 + NOISE[0.7])},
        practical("cats", 0.5): {"a": hits(70), "b": hits(64), TEXT: list(NATS + 0.4 + NOISE[0.5])},
        practical("griffin", 0.55): {"a": hits(20), "b": hits(20), TEXT: list(NATS + 2)},
    }
    return hand_run(folder, answers, **more)


def found(frame, label, level, task):
    rows = frame[(frame["label"] == label) & (frame["bytes_share"] == level) & (frame["task"] == task)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_accuracies_are_linear_in_the_bytes_and_perplexities_their_logarithm(tmp_path):
    frame = material(two_settings(tmp_path)).equal_bytes
    for level, part in ((0.35, 0.25), (0.45, 0.75)):
        assert found(frame, "cats", level, "a")["value"] == pytest.approx(0.5 + 0.2 * part)
        average = found(frame, "cats", level, AVERAGE)
        assert average["value"] == pytest.approx(0.55 + 0.12 * part)
        assert average["part_more"] == pytest.approx(part)
        assert (average["sparsity_less"], average["sparsity_more"]) == (0.7, 0.5)
        assert average["delta_dense"] == pytest.approx(0.55 + 0.12 * part - 0.85)
        assert average["delta_ci_low"] < average["delta_dense"] < average["delta_ci_high"]
        logs = [math.log(np.exp((NATS + cost + NOISE[s]).mean())) for s, cost in ((0.7, 1), (0.5, 0.4))]
        assert math.log(found(frame, "cats", level, TEXT)["value"]) == pytest.approx(
            (1 - part) * logs[0] + part * logs[1]
        )


def test_the_interval_is_that_of_the_weighted_mean_of_the_documents(tmp_path):
    """As if a system had been measured whose nats are those of both settings, mixed document by document."""
    row = found(material(two_settings(tmp_path)).equal_bytes, "cats", 0.35, TEXT)
    mixed = 0.75 * (NATS + 1 + NOISE[0.7]) + 0.25 * (NATS + 0.4 + NOISE[0.5])
    order = sorted(range(50), key=str)  # documents are drawn in the order of their names
    expected = paired_delta(mixed[order], None, NATS[order], None, "perplexity")
    assert [row[c] for c in ("delta_dense", "delta_ci_low", "delta_ci_high")] == pytest.approx(expected)


def test_nothing_is_extrapolated_and_a_setting_at_the_level_is_itself(tmp_path):
    run = two_settings(tmp_path)
    frame = material(run).equal_bytes
    for task in ("a", AVERAGE, TEXT):
        row = found(frame, "cats", 0.55, task)
        assert math.isnan(row["value"])
        assert row["reason"] == "measured from 30.0 to 50.0 %"
    alone = found(frame, "griffin", 0.45, AVERAGE)
    assert (alone["value"], alone["part_more"], alone["reason"]) == (pytest.approx(0.2), 0.0, "")
    assert found(frame, "griffin", 0.35, AVERAGE)["reason"] == "measured at 45.0 % alone"
    table = table_text(run, "equal_bytes")
    middle = table.partition("45 % of the bytes")[2].partition("###")[0]
    assert "| cats | 0.7 and 0.5 | 65.0 | 63.0 | 64.0 | -21.0 [-" in middle
    assert "| dense | – | 90.0 | 80.0 | 85.0 | – | 2" in middle  # noqa: RUF001
    assert "Not reached" not in middle
    last = table.partition("55 % of the bytes")[2]
    assert "|" not in last
    assert "Not reached: griffin: measured at 45.0 % alone; cats: measured from 30.0 to 50.0 %." in last


def test_the_speed_up_is_that_of_the_time_between_both_and_empty_where_one_was_not_timed(tmp_path):
    decode = {"level": "decode", "model": MODEL, "context_tokens": 128}
    times = (("dense", 0.0, 100.0), ("cats", 0.7, 50.0), ("cats", 0.5, 70.0))
    speed = [speed_row(method, sparsity, time, **decode) for method, sparsity, time in times]
    run = two_settings(tmp_path / "timed", speed=speed)
    frame = material(run).equal_bytes
    assert found(frame, "cats", 0.45, SPEED_UP)["value"] == pytest.approx(100 / 65)
    assert found(frame, "griffin", 0.45, SPEED_UP)["reason"] == "not measured"
    assert "| 1.54x |" in table_text(run, "equal_bytes")
    without = two_settings(tmp_path / "half", speed=speed[:2])
    assert found(material(without).equal_bytes, "cats", 0.45, SPEED_UP)["reason"] == "not measured"
    assert SPEED_UP not in table_text(without, "equal_bytes").partition("###")[2]


@pytest.mark.parametrize(
    ("more", "timed", "value"),
    [
        ({"predictor_input": "block"}, [{"predictor_input": "mlp"}], None),
        ({"exact_projection": "gate"}, [{"exact_projection": "up"}], None),
        (
            {"predictor_input": "block"},
            [{"predictor_input": "mlp", "slower": 2}, {"predictor_input": "block"}],
            100 / 65,
        ),
        ({}, [{"threads": 1, "slower": 2}, {"threads": 2}], 100 / 65),
    ],
)
def test_the_speed_up_is_of_the_same_choice_and_of_the_most_threads(tmp_path, more, timed, value):
    """Rows of another input or exact projection are another line's; threads are never mixed."""
    decode = {"level": "decode", "model": MODEL, "context_tokens": 128}
    speed = []
    for number, one in enumerate(timed):
        options = decode | {name: value for name, value in one.items() if name != "slower"}
        times = (("dense", 0.0, 100.0), ("cats", 0.7, 50.0 * one.get("slower", 1)), ("cats", 0.5, 70.0))
        speed += [speed_row(method, s, t, **options) | {"cell_id": f"{number}-{method}-{s}"} for method, s, t in times]
    run = two_settings(tmp_path, speed=speed)
    rows = pd.read_csv(run / "accuracy.csv", dtype=str, keep_default_na=False)
    rows.assign(**{name: rows["method"].map({"cats": value}).fillna("") for name, value in more.items()}).to_csv(
        run / "accuracy.csv", index=False
    )
    found_value = found(material(run).equal_bytes, "cats", 0.45, SPEED_UP)["value"]
    assert math.isnan(found_value) if value is None else found_value == pytest.approx(value)


def test_fits_of_one_method_are_lines_of_their_own_and_failed_settings_are_no_neighbours(tmp_path):
    run = two_settings(tmp_path)
    path = run / "accuracy.csv"
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    other = rows[rows["method"] == "cats"].assign(rank="32", cell_id=lambda f: f["cell_id"] + "-32")
    other.loc[(other["sparsity_target"] == "0.5") & (other["task"] == "b"), ["status", "reason"]] = ["failed", "NaN"]
    pd.concat([rows, other]).to_csv(path, index=False)
    frame = material(run).equal_bytes
    assert found(frame, "cats", 0.45, AVERAGE)["value"] == pytest.approx(0.64)
    assert found(frame, "cats (32)", 0.45, AVERAGE)["reason"] == "measured at 30.0 % alone"
    assert found(frame, "cats (32)", 0.45, TEXT)["reason"] == ""


def test_the_file_is_what_the_schema_says_and_is_read_again(tmp_path):
    run = two_settings(tmp_path)
    write_report(run)
    read = load_results(run).equal_bytes
    assert list(dict.fromkeys(read["bytes_share"])) == list(LEVELS)
    made = material(run).equal_bytes
    for column in EQUAL_BYTES.columns:
        expected = made[column.name].tolist()
        assert read[column.name].tolist() == (pytest.approx(expected, nan_ok=True) if column.is_number else expected)


def models(folder, ideal):
    """Two models by their size, d-countdown ideal at .9, practical at .8 in each."""
    answers = {
        DENSE: {"a": hits(80), TEXT: list(NATS)},
        ("d-countdown", "ideal", 0.9, 0.9): {"a": hits(ideal[0]), TEXT: list(NATS + 1)},
    }
    run = hand_run(folder, answers)
    rows = pd.read_csv(run / "accuracy.csv", dtype=str, keep_default_na=False)
    samples = pd.read_csv(run / "samples.csv.gz", dtype=str, keep_default_na=False)
    other = hand_run(
        folder / "other",
        {key: value | ({"a": hits(ideal[1])} if key != DENSE else {}) for key, value in answers.items()},
    )
    more = pd.read_csv(other / "accuracy.csv", dtype=str, keep_default_na=False).assign(model="any-1.5B")
    more_samples = pd.read_csv(other / "samples.csv.gz", dtype=str, keep_default_na=False)
    for frame in (more, more_samples):
        frame["cell_id"] += "-large"
    pd.concat([more, rows]).to_csv(run / "accuracy.csv", index=False)
    pd.concat([samples, more_samples]).to_csv(run / "samples.csv.gz", index=False)
    return run


@pytest.mark.parametrize(("ideal", "says"), [((40, 70), "falls."), ((70, 40), "does not always fall")])
def test_whether_the_loss_falls_with_size_is_computed(tmp_path, ideal, says):
    run = models(tmp_path, ideal)
    table = table_text(run, "loss_by_size")
    assert f"From model to larger model the loss {says}" in table
    lines = [line for line in table.splitlines() if line.startswith(("| SmolLM2", "| any"))]
    assert lines[0].startswith(f"| {MODEL} | 135M | {100 * (1 - ideal[0] / 80):.1f} [")
    assert lines[1].startswith(f"| any-1.5B | 1500M | {100 * (1 - ideal[1] / 80):.1f} [")
    assert f"| {100 * (ideal[1] - ideal[0]) / 80:+.1f} [" in lines[1]


def test_loss_against_size_is_drawn_with_two_models_or_more(tmp_path):
    data = figure("loss_against_size").frame(material(models(tmp_path / "two", (40, 70))))
    value = {(row["parameters"], row["quantity"]): row["value"] for row in data.to_dict("records")}
    assert value == pytest.approx(
        {
            (135e6, "relative loss of the average"): 0.5,
            (1.5e9, "relative loss of the average"): 0.125,
            (135e6, f"{TEXT} perplexity over dense"): math.e,
            (1.5e9, f"{TEXT} perplexity over dense"): math.e,
        }
    )
    assert figure("loss_against_size").drawn(data) is not None
    alone = two_settings(tmp_path / "one")
    assert figure("loss_against_size").frame(material(alone)).empty
    assert table_text(alone, "loss_by_size") == ""


def test_the_suites_own_order_is_checked_and_said_apart_from_the_claims(tmp_path):
    names = dict.fromkeys(name for pair in ORDER for name in pair)
    cost = dict(zip(names, (0.2, 0.4, 0.6, 0.9, 0.8), strict=True))  # cats better than chess: not as expected
    answers = {DENSE: {TEXT: list(NATS)}} | {practical(n, 0.8): {TEXT: list(NATS + c)} for n, c in cost.items()}
    run = hand_run(tmp_path, answers)
    rows = {(one.first.method, one.second.method): one for one in checked(material(run).quality)}
    assert list(rows) == [*ORDER]
    assert [one.verdict for one in rows.values()] == ["as expected"] * 3 + ["not as expected"]
    assert "| chess below cats |" in table_text(run, "expectations")
    assert not set(material(run).claims["method"]) & {"chess", "m-countdown-cw", "md-countdown"}
    assert table_text(two_settings(tmp_path / "none"), "expectations") == ""
