"""The oracles of the kernels themselves: errors and selections worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kernels_numba.reference import relative_error, wrongly_selected

NAN, INF = math.nan, math.inf
U = 2.0**-24  # rounding unit of fp32


def error(y, reference):
    return relative_error(np.array(y), np.array(reference, dtype=np.float64))


@pytest.mark.parametrize(
    ("y", "reference", "expected"),
    [
        ([1.0, -2.0], [1.0, -2.0], 0.0),
        ([1.0, -2.5], [1.0, -2.0], 0.25),  # over the largest reference, not over its own
        ([1.5, -2.0], [1.0, -2.0], 0.25),
        ([0.0], [0.0], 0.0),
        ([1e-9], [0.0], INF),
        ([], [], 0.0),
    ],
)
def test_relative_error(y, reference, expected):
    assert error(y, reference) == expected


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_a_value_that_is_not_finite_where_the_reference_is_has_an_infinite_error(wrong):
    for y in ([wrong, 2.0], [1.0, wrong], [wrong, wrong]):
        assert error(y, [1.0, 2.0]) == INF
        assert error([1.0, 2.0], y) == INF


def test_values_that_are_not_finite_must_be_the_same():
    assert error([NAN, INF, -INF, 1.0], [NAN, INF, -INF, 1.0]) == 0.0
    assert error([NAN, INF], [NAN, INF]) == 0.0
    assert error([NAN, INF, -INF, 1.5], [NAN, INF, -INF, 1.0]) == 0.5
    for y, reference in (([NAN], [INF]), ([INF], [NAN]), ([INF], [-INF]), ([-INF], [INF])):
        assert error([*y, 1.0], [*reference, 1.0]) == INF


def wrong(scores, active, threshold, d_model, scale=None):
    factors = None if scale is None else np.array(scale, dtype=np.float32)
    return wrongly_selected(np.array(scores), np.array(active, dtype=np.intp), threshold, d_model, factors).tolist()


def test_a_selection_is_wrong_where_the_score_is_clear_of_the_threshold():
    scores = [0.1, 0.9, 0.5, 1.0]
    assert wrong(scores, [1, 3], 0.7, 64) == []
    assert wrong(scores, [3], 0.7, 64) == [1]
    assert wrong(scores, [0, 1, 2, 3], 0.7, 64) == [0, 2]
    assert wrong([NAN, 0.1], [0], 0.7, 64) == []
    assert wrong([NAN, 0.1], [], 0.7, 64) == [0]
    assert wrong([0.1, 0.9], [], INF, 64) == []
    assert wrong([0.1, 0.9], [0], -INF, 64) == [1]


@pytest.mark.parametrize("d_model", [64, 4096])
@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_the_band_of_rounding_is_as_wide_as_it_says(side, d_model):
    """A dot product's error, 4 u sqrt(d_model) of the largest score, may put a score on either side; 1 % more may not."""
    width = 4 * U * math.sqrt(d_model) * 2.0
    inside, outside = 1.0 + side * 0.99 * width, 1.0 + side * 1.01 * width
    mine = [0] if side < 0 else []  # kept although below, or dropped although above
    assert wrong([inside, 2.0], [*mine, 1], 1.0, d_model) == []
    assert wrong([outside, 2.0], [*mine, 1], 1.0, d_model) == [0]


@pytest.mark.parametrize("factor", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_a_factor_scales_the_score_and_its_band(side, factor):
    """The error is that of the dot product times the neuron's own factor, not the largest one."""
    width, scale = 4 * U * math.sqrt(4096) * 2.0, np.array([factor, 1000.0], dtype=np.float32)
    threshold = float(scale[0])
    inside, outside = 1.0 + side * 0.99 * width, 1.0 + side * 1.01 * width
    mine = [0] if side < 0 else []
    assert wrong([inside, 2.0], [*mine, 1], threshold, 4096, scale) == []
    assert wrong([outside, 2.0], [*mine, 1], threshold, 4096, scale) == [0]
    assert wrong([5.0, 1.0], [1], threshold, 4096, [0.0, 1000.0]) == []  # factor 0: score 0


def test_a_large_threshold_has_a_band_of_8_units():
    for distance, expected in ((7.9, []), (8.1, [0])):
        assert wrong([1e6 * (1 - distance * U)], [0], 1e6, 1) == expected
        assert wrong([1e6 * (1 - distance * U), 1e-3], [0], 1e6, 1) == expected


def test_a_score_equal_to_the_threshold_counts_as_kept():
    assert wrong([INF, 0.1], [0], INF, 64) == []  # any other equal score lies within the band
    assert wrong([INF, 0.1], [], INF, 64) == [0]
