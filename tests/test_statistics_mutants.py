"""What the bootstrap draws: its own stream a task and a batch of resamples, and every system's own weights."""

from __future__ import annotations

import numpy as np
import pytest

from suite import statistics
from suite.statistics import Units, bootstrap_interval

N_RESAMPLES = 400


@pytest.fixture(autouse=True)
def fresh_draws():
    """Draws are kept between calls by their seed; none of another test's."""
    statistics._counts.cache_clear()
    yield
    statistics._counts.cache_clear()


def samples(n_systems=1, n_units=50):
    return np.random.default_rng(0).normal(size=(n_systems, n_units))


def test_tasks_with_equally_many_documents_are_resampled_independently():
    values = samples()
    tasks = [Units.of(values), Units.of(values)]
    seen = []

    def difference(means):
        seen.append(means)
        return means[0][0] - means[1][0]

    value, low, high = bootstrap_interval(tasks, difference, n_resamples=N_RESAMPLES)
    assert value == 0
    first, second = (task[0] for task in seen[-1])
    # independent columns: a correlation of 400 pairs is below 4 / sqrt(400)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(N_RESAMPLES)
    error = np.sqrt(2 / 50) * values.std()
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.25)


def test_resamples_that_are_drawn_in_batches_are_all_different(monkeypatch):
    monkeypatch.setattr(statistics, "_BATCH_ELEMENTS", 50 * 7)  # 7 resamples at once
    means = Units.of(samples()).resampled_means(N_RESAMPLES, seed=0, stream=0)
    assert means.shape == (1, N_RESAMPLES)
    assert len(np.unique(means)) == N_RESAMPLES  # sums of 50 normal values: none twice but by the same draws


def test_a_seed_and_a_stream_decide_the_draws():
    units = Units.of(samples())
    draws = {key: units.resampled_means(20, *key) for key in ((0, 0), (1, 0), (0, 1))}
    assert np.array_equal(units.resampled_means(20, 0, 0), draws[0, 0])
    assert not np.isin(draws[1, 0], draws[0, 0]).any()
    assert not np.isin(draws[0, 1], draws[0, 0]).any()


@pytest.mark.parametrize("same", [None, 0, 1])
def test_every_system_is_divided_by_its_own_weights(same):
    """Values that are ``ratio * weight`` have that ratio in every resample, whatever is drawn."""
    rng = np.random.default_rng(1)
    weights = rng.integers(1, 100, size=(3, 50)).astype(float)
    if same is not None:
        weights[2] = weights[same]  # equal weights are summed once
    ratios = np.array([[2.0], [3.0], [5.0]])
    means = Units.of(ratios * weights, weights).resampled_means(N_RESAMPLES, seed=0, stream=0)
    # sums of whole numbers below 2**53 are exact
    assert np.array_equal(means, np.broadcast_to(ratios, means.shape))


def test_draws_are_shared_by_the_systems_of_a_task():
    values = samples()
    means = Units.of(np.concatenate([values, values + 1.0])).resampled_means(N_RESAMPLES, seed=0, stream=0)
    # the rounding of sums of 50 values of at most 4
    np.testing.assert_allclose(means[1] - means[0], 1.0, rtol=0, atol=50 * 4 * np.finfo(float).eps)
