"""Known answers and properties of suite.statistics."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from suite.errors import InputError
from suite.statistics import (
    Units,
    bootstrap_interval,
    paired_delta,
    resampling_group,
    standard_error,
    statistic,
)

EPS = float(np.finfo(np.float64).eps)
binary = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=40)


def test_statistic_known_answers():
    assert statistic([1, 0, 1, 1], None, "acc") == 0.75
    # two documents of 3 and 1 tokens with 6 and 2 nats: 2 nats a token
    assert statistic([6.0, 2.0], [3, 1], "perplexity") == pytest.approx(math.exp(2.0), rel=8 * EPS)
    assert statistic([6.0, 2.0], [3, 1], "word_perplexity") == pytest.approx(math.exp(2.0), rel=8 * EPS)
    assert statistic([6.0, 2.0], [3, 1], "bits_per_byte") == pytest.approx(2.0 / math.log(2), rel=8 * EPS)
    assert statistic([6.0, 2.0], [3, 1], "kl_dense") == 2.0


def test_standard_error_of_a_mean_is_the_textbook_one():
    values = np.random.default_rng(1).random(50)
    assert standard_error(values, None, "acc") == pytest.approx(stats.sem(values), rel=50 * EPS)


def test_standard_error_of_groups_is_that_of_the_group_means():
    means = np.array([0.0, 1.0, 0.5, 0.5])
    values = np.repeat(means, 3)
    groups = np.repeat(list("abcd"), 3)
    assert standard_error(values, None, "acc", groups) == pytest.approx(stats.sem(means), rel=50 * EPS)
    assert standard_error(values, None, "acc", groups) > standard_error(values, None, "acc")


def test_standard_error_of_a_perplexity_agrees_with_the_spread_of_repeated_draws():
    rng = np.random.default_rng(2)
    weights = rng.integers(5, 60, size=(4000, 200)).astype(float)
    values = weights * 2.0 + np.sqrt(weights) * rng.normal(size=weights.shape)
    spread = np.std(np.exp(values.sum(1) / weights.sum(1)))
    claimed = np.mean([standard_error(v, w, "perplexity") for v, w in zip(values[:200], weights[:200], strict=True)])
    assert claimed == pytest.approx(spread, rel=0.05)  # 1/sqrt(2*4000) = 1.1 %, 1/sqrt(2*200*200) = .4 %


def test_one_document_has_a_value_and_nothing_else():
    assert standard_error([1.0], None, "acc") is None
    assert paired_delta([1.0], None, [0.0], None, "acc") == (1.0, None, None)
    assert standard_error([1.0, 0.0], None, "acc", ["t", "t"]) is None


def test_a_constant_difference_has_an_interval_of_no_width():
    base = np.random.default_rng(0).random(30)
    delta, low, high = paired_delta(base + 0.25, None, base, None, "acc")
    assert delta == pytest.approx(0.25, abs=30 * EPS)
    assert low == pytest.approx(0.25, abs=30 * EPS)
    assert high == pytest.approx(0.25, abs=30 * EPS)


def test_pairing_is_what_narrows_the_interval():
    rng = np.random.default_rng(3)
    base = rng.normal(size=300) * 10
    own = base + 0.1 + 0.01 * rng.normal(size=300)
    _, low, high = paired_delta(own, None, base, None, "acc")
    assert 0.09 < low < 0.1 < high < 0.11
    shuffled = rng.permutation(own)
    _, low, high = paired_delta(shuffled, None, base, None, "acc")
    assert high - low > 1.0


def test_interval_agrees_with_the_normal_one_on_many_documents():
    rng = np.random.default_rng(4)
    own, base = rng.random(2000) < 0.55, rng.random(2000) < 0.6
    delta, low, high = paired_delta(own, None, base, None, "acc")
    half = 1.96 * stats.sem(own.astype(float) - base.astype(float))
    # 2000 resamples know a 2.5 % quantile to about 0.05 standard errors
    assert low == pytest.approx(delta - half, abs=0.15 * half)
    assert high == pytest.approx(delta + half, abs=0.15 * half)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    hits = 0
    for seed in range(300):
        own, base = rng.normal(0.3, 1, 80), rng.normal(0.0, 1, 80)
        _, low, high = paired_delta(own, None, base, None, "acc", n_resamples=400, seed=seed)
        hits += low <= 0.3 <= high
    assert 0.90 <= hits / 300 <= 0.985  # .95 +- 3.5 binomial standard errors, a percentile interval a little below


def test_perplexities_are_compared_as_ratios():
    rng = np.random.default_rng(6)
    weights = rng.integers(5, 60, size=100).astype(float)
    base = weights * (2 + rng.normal(size=100))
    own = base + weights * math.log(1.5)  # every document exactly 1.5 times the perplexity
    delta, low, high = paired_delta(own, weights, base, weights, "perplexity")
    dense = statistic(base, weights, "perplexity")
    for end in (delta, low, high):
        assert end == pytest.approx(0.5 * dense, rel=1e4 * EPS)


def test_generated_items_are_resampled_by_template():
    assert resampling_group("agreement/12") == "agreement"
    assert resampling_group("17") == "17"
    rng = np.random.default_rng(7)
    effect = rng.normal(size=12)
    own = np.repeat(effect, 50) + 0.01 * rng.normal(size=600)
    groups = [resampling_group(f"{t}/{i}") for t in range(12) for i in range(50)]
    _, low, high = paired_delta(own, None, np.zeros(600), None, "acc", groups)
    _, low_alone, high_alone = paired_delta(own, None, np.zeros(600), None, "acc")
    assert high - low > 5 * (high_alone - low_alone)  # sqrt(50) = 7 times


def test_average_over_tasks_resamples_within_each_task():
    rng = np.random.default_rng(8)
    tasks = [Units.of(rng.random((2, n)) < 0.5) for n in (40, 400)]

    def average(means):
        return sum(m[0] - m[1] for m in means) / len(means)

    value, low, high = bootstrap_interval(tasks, average)
    error = math.sqrt(sum(stats.sem(t.values[0] - t.values[1]) ** 2 for t in tasks)) / 2
    assert value == pytest.approx(np.mean([t.values[0].mean() - t.values[1].mean() for t in tasks]), abs=400 * EPS)
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.12)


def test_interval_is_that_of_scipys_bootstrap():
    rng = np.random.default_rng(11)
    own, base = rng.exponential(size=(2, 300))
    _, low, high = paired_delta(own, None, base, None, "acc", n_resamples=20_000)
    theirs = stats.bootstrap(
        (own - base,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    )
    width = high - low  # the end of 20000 draws scatters by 1.5 % of the width
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.03 * width)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.03 * width)


@pytest.mark.filterwarnings("error")
def test_a_ratio_to_nothing_has_no_interval():
    tasks = [Units.of([[1, 1, 0, 1], [0, 0, 0, 0]])]
    value, low, high = bootstrap_interval(tasks, lambda means: means[0][0] / means[0][1])
    assert (value, low, high) == (math.inf, None, None)
    tasks = [Units.of([[1, 1, 0, 1], [0, 0, 1, 0]])]  # a resample without the third document
    value, low, high = bootstrap_interval(tasks, lambda means: means[0][0] / means[0][1])
    assert (value, low, high) == (3.0, None, None)


@given(own=binary, seed=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_swapping_the_systems_turns_the_sign_round(own, seed):
    base = [1.0 - v if i % 3 else v for i, v in enumerate(own)]
    there = paired_delta(own, None, base, None, "acc", n_resamples=200, seed=seed)
    back = paired_delta(base, None, own, None, "acc", n_resamples=200, seed=seed)
    assert there == paired_delta(own, None, base, None, "acc", n_resamples=200, seed=seed)
    tolerance = 8 * len(own) * EPS
    assert there[0] == pytest.approx(-back[0], abs=tolerance)
    assert there[1] == pytest.approx(-back[2], abs=tolerance)
    assert there[2] == pytest.approx(-back[1], abs=tolerance)


@given(values=st.lists(st.floats(-5, 5), min_size=2, max_size=30))
@settings(max_examples=25, deadline=None)
def test_a_system_does_not_differ_from_itself(values):
    weights = [1.0 + i % 4 for i in range(len(values))]
    for metric in ("acc", "perplexity", "bits_per_byte"):
        assert paired_delta(values, weights, values, weights, metric, n_resamples=100) == (0.0, 0.0, 0.0)


def test_memory_stays_bounded_with_many_documents():
    rng = np.random.default_rng(9)
    delta, low, high = paired_delta(rng.random(30_000), None, rng.random(30_000), None, "acc", n_resamples=200)
    assert low < delta < high


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([], None, "no document"),
        ([1.0, float("nan")], None, "not finite"),
        ([1.0, float("inf")], None, "not finite"),
        ([1.0, 2.0], [1.0], "same documents"),
        ([1.0, 2.0], [0.0, 0.0], "positive sum"),
        ([1.0, 2.0], [1.0, -1.0], ">= 0"),
    ],
)
def test_bad_samples_are_refused(values, weights, message):
    with pytest.raises(InputError, match=message):
        statistic(values, weights, "acc")


def test_unpaired_samples_are_refused():
    with pytest.raises(InputError, match="pair them by doc_id"):
        paired_delta([1.0, 0.0], None, [1.0], None, "acc")
    with pytest.raises(InputError, match="groups"):
        standard_error([1.0, 0.0], None, "acc", ["a"])
