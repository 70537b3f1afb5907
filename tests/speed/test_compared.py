"""Two timings of a case: what a test says of them, and what it cannot."""

import numpy as np
import pytest

from suite.speed.compared import verdicts

RANDOM = np.random.default_rng(0)
BASE = list(RANDOM.normal(100, 2, 50))


def test_what_differs_is_named_by_its_direction():
    slower, faster = ([value * factor for value in RANDOM.normal(100, 2, 50)] for factor in (1.05, 0.95))
    assert verdicts([(BASE, slower), (BASE, faster)]) == ["slower", "faster"]


def test_rounds_of_the_same_are_no_difference_in_nearly_all_comparisons():
    """At 5 % for 40 cases together, 40 comparisons of 40 cases have two with a false alarm on average."""
    alarms = 0
    for _ in range(40):
        pairs = [(list(RANDOM.normal(100, 2, 20)), list(RANDOM.normal(100, 2, 20))) for _ in range(40)]
        alarms += any(verdict != "no difference" for verdict in verdicts(pairs))
    assert alarms <= 7  # more have a probability of 1e-3


@pytest.mark.parametrize("pair", [([], BASE), (BASE, []), ([], []), (BASE[:2], BASE[:2])])
def test_too_few_rounds_are_untested(pair):
    assert verdicts([pair]) == ["untested"]


def test_more_cases_need_more_rounds():
    few = ([1.0, 2.0, 3.0, 4.0, 5.0], [11.0, 12.0, 13.0, 14.0, 15.0])  # p = 2 / 252
    assert verdicts([few]) == ["slower"]
    assert verdicts([few] * 10) == ["untested"] * 10


def test_equal_rounds_are_no_difference():
    assert verdicts([([1.0] * 50, [1.0] * 50)]) == ["no difference"]
