"""Rounds, their order, and the ceiling that times are held against."""

import time

from suite.speed import clock
from suite.speed.clock import ReadBandwidth, Rounds, time_interleaved, wall_times


def interleaved(n, rounds):
    """Order in which subjects were sampled, by round, and what was said."""
    order, told = [[]], []

    def sample(subject):
        order[-1].append(subject)
        return [float(subject)] * 2

    samples = [lambda subject=subject: sample(subject) for subject in range(n)]
    found = time_interleaved(samples, rounds, lambda: order.append([]), told.append)
    return order[:-1], found, told


def test_the_order_rotates_and_every_subject_is_sampled_once_a_round():
    order, found, told = interleaved(3, Rounds(4, 4))
    assert order == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]
    assert found == [[0.0] * 8, [1.0] * 8, [2.0] * 8]
    assert told == ["round 1", "round 2", "round 3", "round 4"]


def test_a_budget_is_kept_within_its_bounds(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    assert len(interleaved(2, Rounds(5, 50))[0]) == 5
    assert len(interleaved(2, Rounds(2, 50, budget_s=6))[0]) == 13  # a second a look at the clock: 12 s for two
    assert len(interleaved(2, Rounds(2, 7, budget_s=6))[0]) == 7


def test_the_ceiling_is_the_median_of_the_faster_kernel():
    seconds = {"slow": iter([4.0, 5.0, 6.0]), "fast": iter([2.0, 1.0, 4.0])}
    reads, made = [], []
    for name in seconds:
        reads.append(lambda name=name: made.append(name))

    def timer(run, n):
        run()
        return [next(seconds[made[-1]]) for _ in range(n)]

    bandwidth = ReadBandwidth(reads, 8, timer)
    assert made == ["slow", "fast"]  # once to compile, untimed
    for _ in range(3):
        bandwidth.measure()
    assert bandwidth.bytes_per_s == 4.0


def test_a_cpu_reads_several_times_its_last_cache(monkeypatch):
    monkeypatch.setattr(clock, "_MIN_BUFFER", 1 << 16)
    monkeypatch.setattr(clock, "last_level_cache_bytes", lambda: 1 << 15)
    bandwidth = clock.cpu_bandwidth(1)
    bandwidth.measure()
    assert bandwidth._n_bytes == 1 << 17
    assert 1e8 < bandwidth.bytes_per_s < 1e13


def test_wall_times_are_of_each_call():
    seconds = wall_times(lambda: time.sleep(0.002), 3)
    assert len(seconds) == 3
    assert min(seconds) >= 0.0019
