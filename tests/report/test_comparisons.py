"""Methods against each other and the effect of the scope, on hand-made runs with known answers."""

import math
import re

import numpy as np
import pytest
from scipy import stats

from suite.report.comparisons import corrected, holm, p_value, pair_rows
from suite.report.findings import paired_lines
from tests.report.parts import quality, table_text
from tests.report.synthetic import hand_run, hits


def lines_of(text: str, start: str) -> list[list[str]]:
    return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(f"| {start}")]


def test_holm_against_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_p_value_is_that_of_the_z_test():
    rng = np.random.default_rng(0)
    draws = rng.normal(0.05, 1, 2000)
    error = draws.std(ddof=1) / math.sqrt(len(draws))
    interval = (draws.mean(), draws.mean() - 1.959964 * error, draws.mean() + 1.959964 * error)
    assert p_value(interval) == pytest.approx(stats.norm.sf(abs(draws.mean()) / error) * 2, rel=1e-5)
    assert p_value((0.1, None, None)) is None
    assert p_value((0.0, 0.0, 0.0)) == 1.0
    assert p_value((0.2, 0.2, 0.2)) is None


@pytest.fixture
def pairs(tmp_path):
    """M-COUNTDOWN 40 points above CATS on one task, equal on the other; practical ones at unequal realised sparsity."""
    answers = {
        ("dense", "none", 0.0, 0.0): {"arc_easy": hits(90), "piqa": hits(80)},
        ("cats", "ideal", 0.8, 0.8): {"arc_easy": hits(30), "piqa": hits(50)},
        ("m-countdown", "ideal", 0.8, 0.8): {"arc_easy": hits(70), "piqa": hits(50)},
        ("d-countdown", "ideal", 0.8, 0.8): {"arc_easy": hits(88), "piqa": hits(78)},
        ("dejavu", "ideal", 0.8, 0.8): {"arc_easy": hits(28), "piqa": hits(50)},
        ("cats", "practical", 0.8, 0.75): {"arc_easy": hits(60), "piqa": hits(60)},
        ("m-countdown", "practical", 0.8, 0.8): {"arc_easy": hits(20), "piqa": hits(20)},
    }
    return hand_run(tmp_path / "run", answers)


def test_paired_table_has_differences_stars_and_unequal_rows(pairs):
    text = table_text(pairs, "methods_against_each_other")
    block = text.partition("### m-countdown against cats")[2].partition("### ")[0]
    (ideal,) = lines_of(block, "ideal 0.8")
    (practical,) = lines_of(block, "practical 0.8")
    header = lines_of(block, "setting")[0]
    assert header == ["setting", "realised", "arc_easy", "piqa", "average"]
    assert re.fullmatch(r"\+40\.0 \[\+3\d\.\d, \+\d\d\.\d\] \*", ideal[2])
    assert ideal[3] == "+0.0 [+0.0, +0.0]"
    assert re.fullmatch(r"\+20\.0 \[.*\] \*", ideal[4])
    assert practical[1] == "0.800 / 0.750 ≠"
    assert practical[2].startswith("-40.0")
    assert "*" not in "".join(practical)
    assert "3 comparisons, after correction m-countdown better in 2 and worse in 0" in block
    assert "### d-countdown against dejavu:" in text
    assert "### d-countdown against dejavu-abs" not in text  # not in this run
    assert sum("m-countdown against cats" in line for line in paired_lines(quality(pairs))) == 1


def test_perplexities_are_compared_as_ratios(tmp_path):
    rng = np.random.default_rng(1)
    base = rng.normal(3.0, 0.5, 60)
    answers = {
        ("dense", "none", 0.0, 0.0): {"arc_easy": hits(90), "decode_perplexity": (base - 1).tolist()},
        ("cats", "ideal", 0.8, 0.8): {"arc_easy": hits(40), "decode_perplexity": base.tolist()},
        ("m-countdown", "ideal", 0.8, 0.8): {
            "arc_easy": hits(40),
            "decode_perplexity": (base - math.log(2) + rng.normal(0, 0.01, 60)).tolist(),
        },
    }
    run = hand_run(tmp_path / "run", answers)
    (rows,) = pair_rows(quality(run), "m-countdown", "cats").values()
    found = rows[0].comparisons["decode_perplexity perplexity"]
    assert found.found[0] == pytest.approx(-math.log(2), abs=0.01)
    assert found.is_ratio
    assert corrected(rows)[0, "decode_perplexity perplexity"] < 1e-6
    (line,) = lines_of(table_text(run, "methods_against_each_other"), "ideal 0.8")
    assert line[-1].startswith(("-50.", "-49.")), line
    assert line[-1].endswith("*")
    assert "better in 1, worse in 0" in paired_lines(quality(run))[0]


def test_scope_effect_is_the_part_of_the_loss_that_scope_paper_hides(tmp_path):
    answers = {
        ("dense", "none", 0.0, 0.0): {"arc_easy": hits(90), "piqa": hits(80)},
        ("cats", "ideal", 0.8, 0.8): {"arc_easy": hits(50), "piqa": hits(40)},
        ("cats", "ideal", 0.8, 0.8, "paper"): {"arc_easy": hits(80), "piqa": hits(70)},
    }
    run = hand_run(tmp_path / "run", answers)
    (row,) = lines_of(table_text(run, "scope_effect"), "cats")
    assert row[:6] == ["cats", "ideal", "0.8", "85.0", "75.0", "45.0"]
    assert row[6].startswith("+30.0 [+2")
    assert row[7].startswith("+75 [")  # of 40 points lost, 10 show
    assert row[8] == "25 %"


def test_scope_effect_of_one_scope_is_empty_with_its_reason(pairs):
    assert "Empty: this run has finished settings of scope scored only" in table_text(pairs, "scope_effect")
