"""Tables of hand-made runs with known answers."""

import numpy as np
import pandas as pd
import pytest

from suite.report.quality import above_chance, are_unequal
from suite.report.tables import TABLES
from suite.report.text import MISSING
from tests.report.parts import material, quality, table_text
from tests.report.synthetic import accuracy_row, hand_run, hits, manifest, write_run

DENSE = ("dense", "none", 0.0, 0.0)


def ideal(method):
    return (method, "ideal", 0.8, 0.8)


def row(table, method):
    """Cells of a method's row in the last block."""
    line = next(line for line in reversed(table.splitlines()) if line.startswith(f"| {method} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_best_is_bold_only_beyond_the_interval(tmp_path):
    # clear: 40 documents apart; close: 1 of 100 documents, whose interval [-.03, .0] ends at 0
    answers = {
        DENSE: {"clear": hits(90), "close": hits(90)},
        ideal("random"): {"clear": hits(25), "close": hits(25)},
        ideal("cats"): {"clear": hits(40), "close": hits(79)},
        ideal("m-countdown"): {"clear": hits(80), "close": hits(80)},
    }
    table = table_text(hand_run(tmp_path, answers), "accuracy")
    assert row(table, "m-countdown") == ["m-countdown", "0.800", "**80.0**", "80.0", "**80.0**"]
    assert row(table, "cats") == ["cats", "0.800", "40.0", "79.0", "59.5"]
    assert row(table, "dense")[2:] == ["90.0", "90.0", "90.0"]


def test_a_better_average_needs_its_own_interval(tmp_path):
    better, worse = hits(60), [1.0 - v for v in hits(60)]  # on other documents: the difference is not settled
    answers = {
        DENSE: {"task": hits(90)},
        ideal("cats"): {"task": [*worse[:50], *hits(10, 50)]},
        ideal("m-countdown"): {"task": [*better[:30], *worse[30:]]},
    }
    table = table_text(hand_run(tmp_path, answers), "accuracy")
    assert "**" in row(table, "m-countdown")[2]  # 70 against 10
    answers[ideal("cats")] = {"task": [1.0 - v for v in hits(35)]}
    table = table_text(hand_run(tmp_path / "b", answers), "accuracy")
    assert "**" not in table.partition("###")[2]


def test_practical_methods_of_unequal_realised_sparsity_are_marked_and_not_compared(tmp_path):
    answers = {
        DENSE: {"task": hits(90)},
        ideal("random"): {"task": hits(25)},
        ("cats", "practical", 0.8, 0.78): {"task": hits(20)},
        ("m-countdown", "practical", 0.8, 0.8): {"task": hits(80)},
    }
    table = table_text(hand_run(tmp_path, answers), "accuracy")
    assert row(table, "cats")[1:3] == ["0.780 ≠", "20.0"]
    assert row(table, "m-countdown")[1:3] == ["0.800 ≠", "80.0"]
    assert "cats 0.780, m-countdown 0.800" in table
    assert "random (ideal)" in table
    answers[("cats", "practical", 0.8, 0.79)] = answers.pop(("cats", "practical", 0.8, 0.78))
    table = table_text(hand_run(tmp_path / "equal", answers), "accuracy")
    assert row(table, "m-countdown")[1:3] == ["0.800", "**80.0**"]


@pytest.mark.parametrize(("modes", "unequal"), [(("ideal",) * 2, False), (("practical", "ideal"), True)])
def test_ideal_settings_are_compared_whatever_they_realise(tmp_path, modes, unequal):
    """They keep exactly k neurons: of few neurons, k is not the target."""
    answers = {DENSE: {"task": hits(90)}, ("cats", modes[0], 0.8, 0.75): {"task": hits(20)}}
    answers[("m-countdown", modes[1], 0.8, 0.8)] = {"task": hits(80)}
    found = quality(hand_run(tmp_path, answers))
    one, other = (s for s in found.settings(found.summary) if not s.is_dense)
    assert are_unequal(one, other) is unequal


def test_failed_and_missing_cells_are_no_numbers(tmp_path):
    answers = {
        DENSE: {"a": hits(90), "b": hits(90)},
        ideal("cats"): {"a": hits(40)},
        ideal("m-countdown"): {"a": hits(80), "b": hits(80)},
    }
    run = hand_run(tmp_path, answers)
    text = (run / "accuracy.csv").read_text()

    failed = accuracy_row("cats", "b", "", "", status="failed", reason="NaN in the logits of layer 3", chance="")
    missing = accuracy_row("d-countdown", "a", "", "", status="missing", reason="not run yet")
    rows = pd.DataFrame([failed, missing]).reindex(columns=text.splitlines()[0].split(","))
    rows.to_csv(run / "accuracy.csv", mode="a", header=False, index=False)
    table = table_text(run, "accuracy")
    assert row(table, "cats") == ["cats", "0.800", "40.0", "failed", MISSING]
    assert row(table, "m-countdown")[2:] == ["80.0", "80.0", "80.0"]  # nothing is best while a rival has no value
    assert row(table, "d-countdown")[2:] == [MISSING, MISSING, MISSING]
    assert "cats on b: NaN in the logits of layer 3" in table


def test_the_summary_takes_acc_norm_then_acc_then_exact_match(tmp_path):
    rows = [
        accuracy_row("cats", "a", "acc", 0.1),
        accuracy_row("cats", "a", "acc_norm", 0.2),
        accuracy_row("cats", "b", "exact_match", 0.3, filter="flexible-extract"),
        accuracy_row("cats", "b", "exact_match", 0.4, filter="strict-match"),
        accuracy_row("cats", "c", "word_perplexity", 30.0),
    ]
    table = table_text(write_run(tmp_path, rows, manifest=manifest()), "accuracy")
    assert "a (acc_norm) | b (exact_match) | average" in table
    assert row(table, "cats")[2:] == ["20.0", "40.0", "30.0"]


def test_share_of_above_chance_accuracy_kept(tmp_path):
    answers = {
        DENSE: {"good": hits(85), "poor": hits(27)},
        ideal("cats"): {"good": hits(55), "poor": hits(25)},
    }
    table = table_text(hand_run(tmp_path, answers), "above_chance")
    assert row(table, "cats") == ["cats", "50", MISSING, "50"]  # (.55 - .25) / (.85 - .25)
    assert "poor: empty, dense 27.0 is not 3 standard errors (4.5) above chance 25.0" in table


@pytest.mark.parametrize(("value", "fine"), [(0.40, True), (0.399, False)])
def test_three_standard_errors_above_chance_is_the_border(value, fine):
    cell = {"value": value, "stderr": 0.04999, "chance": 0.25, "status": "ok"}
    assert above_chance(cell)[0] is fine


def test_differences_to_dense_come_from_the_rows_and_the_average_from_the_samples(tmp_path):
    answers = {
        DENSE: {"a": hits(90), "b": hits(50)},
        ideal("cats"): {"a": hits(80), "b": hits(50)},
    }
    cells = row(table_text(hand_run(tmp_path, answers), "difference_to_dense"), "cats")
    assert cells[1].startswith("-10.0 [-1")
    assert cells[2] == "+0.0 [+0.0, +0.0]"
    assert cells[3].startswith("-5.0 [")


def test_the_lowest_perplexity_is_best(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.normal(3, 0.3, 60)
    answers = {
        DENSE: {"decode_perplexity": list(base)},
        ideal("cats"): {"decode_perplexity": list(base + 1.0)},
        ideal("m-countdown"): {"decode_perplexity": list(base + 0.5)},
    }
    table = table_text(hand_run(tmp_path, answers, metric="perplexity"), "perplexity")
    value = np.exp(base.mean() + 0.5)
    assert row(table, "m-countdown")[2] == f"**{value:.2f}**"
    assert row(table, "cats")[2] == f"{np.exp(base.mean() + 1.0):.2f}"


def test_settings_of_one_method_are_told_apart(tmp_path):
    answers = {DENSE: {"task": hits(90)}, ("cats", "practical", 0.8, 0.8): {"task": hits(70)}}
    run = hand_run(tmp_path, answers)

    frame = pd.read_csv(run / "accuracy.csv", dtype=str, keep_default_na=False)
    frame.loc[frame["method"] == "cats", "estimator"] = "calibrated"
    other = frame[frame["method"] == "cats"].assign(estimator="mean-kth", cell_id="other", value="0.6")
    pd.concat([frame, other]).to_csv(run / "accuracy.csv", index=False)
    table = table_text(run, "accuracy")
    assert row(table, "cats (calibrated)")[2] == "70.0"
    assert row(table, "cats (mean-kth)")[2] == "60.0"


def test_without_samples_nothing_is_bold(tmp_path):
    run = hand_run(tmp_path, {DENSE: {"t": hits(90)}, ideal("cats"): {"t": hits(10)}, ideal("random"): {"t": hits(1)}})
    assert "**10.0**" in table_text(run, "accuracy")
    (run / "samples.csv.gz").unlink()
    assert "**" not in table_text(run, "accuracy").partition("###")[2]


def test_a_task_of_one_sparsity_stands_beside_the_average(tmp_path):
    answers = {
        DENSE: {"a": hits(80), "g": hits(10)},
        ("cats", "ideal", 0.5, 0.5): {"a": hits(70)},
        ("cats", "ideal", 0.8, 0.8): {"a": hits(60), "g": hits(2)},
    }
    table = table_text(hand_run(tmp_path, answers), "accuracy")
    assert "| method | realised | a (acc) | average | g (acc) |" in table
    assert "| cats | 0.800 | 60.0 | 60.0 | 2.0 |\n" in table
    assert "| cats | 0.500 | 70.0 | 70.0 |\n" in table
    assert "right of the average" in table


def test_tables_say_which_split_the_examples_come_from(tmp_path):
    shots = {"scored": (3, "test (scored)"), "trained": (5, "train"), "bare": (0, "")}
    rows = [
        accuracy_row("dense", task, "acc", 0.5, num_fewshot=number, fewshot_split=split)
        for task, (number, split) in shots.items()
    ]
    rows.append(accuracy_row("dense", "decode_perplexity", "perplexity", 9.0))
    run = write_run(tmp_path / "run", rows, [], manifest=manifest())
    note = (
        "\nFew-shot examples: scored 3 from `test`, the scored split, without the document itself; "
        "trained 5 from `train`.\n"
    )
    for name in ("accuracy", "difference_to_dense", "methods_against_each_other", "above_chance", "perplexity"):
        assert table_text(run, name).endswith(note), name
    older = write_run(tmp_path / "older", [row | {"fewshot_split": ""} for row in rows], [], manifest=manifest())
    assert not any("Few-shot" in table.markdown(material(older)) for table in TABLES)
