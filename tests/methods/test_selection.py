"""Selection against a plain definition, on scores that tie, overflow and are NaN."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from suite.errors import InputError
from suite.methods.base import _break_ties, kept_count, select_threshold, select_top_k

LARGEST = torch.finfo(torch.float32).max
few = st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 1.0, 1.0078125, LARGEST, math.inf, math.nan])
scores = st.integers(1, 12).flatmap(
    lambda width: st.lists(
        st.lists(st.one_of(few, st.floats(width=32)), min_size=width, max_size=width), min_size=1, max_size=4
    )
)


def by_definition(row: list[float], k: int) -> set[int]:
    """Largest first, NaN above infinity, ties by lowest index."""
    order = sorted(range(len(row)), key=lambda i: (not math.isnan(row[i]), 0 if math.isnan(row[i]) else -row[i], i))
    return set(order[:k])


@settings(max_examples=300, deadline=None)
@given(scores, st.data())
def test_top_k_is_the_definition(rows, data):
    k = data.draw(st.integers(1, len(rows[0])))
    score = torch.tensor(rows, dtype=torch.float32)
    keep = select_top_k(score, k)
    for row, kept in zip(score.tolist(), keep, strict=True):
        assert set(kept.nonzero().flatten().tolist()) == by_definition(row, k)


@settings(max_examples=100, deadline=None)
@given(scores, st.sampled_from([torch.bfloat16, torch.float16, torch.float64]), st.data())
def test_top_k_is_the_same_in_every_dtype_and_exact(rows, dtype, data):
    k = data.draw(st.integers(1, len(rows[0])))
    score = torch.tensor(rows, dtype=torch.float32).to(dtype)
    keep = select_top_k(score, k)
    assert (keep.sum(-1) == k).all()
    assert torch.equal(keep, select_top_k(score.float(), k))


@settings(max_examples=200, deadline=None)
@given(scores, st.floats(width=32, allow_nan=False))
def test_threshold_keeps_what_is_not_below_it(rows, threshold):
    keep = select_threshold(torch.tensor(rows, dtype=torch.float32), threshold)
    assert keep.tolist() == [[not value < threshold for value in row] for row in torch.tensor(rows).tolist()]


def test_a_score_equal_to_the_threshold_is_kept():
    score = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, -math.inf]])
    assert select_threshold(score, 2.0).tolist() == [[False, True, True], [True, True, False]]
    assert select_threshold(score, torch.tensor([[3.0], [-math.inf]])).tolist() == [[False, False, True], [True] * 3]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20000), st.integers(0, 999))
def test_kept_count_is_exact(d_ff, thousandths):
    k = kept_count(d_ff, thousandths / 1000)
    assert k == max(1, d_ff - math.floor(Fraction(thousandths, 1000) * d_ff))
    assert 1 <= k <= d_ff


def test_kept_count_of_decimals_that_binary_rounds():
    assert kept_count(100, 0.29) == 71  # .29 * 100 is 28.999999999999996 in binary
    assert kept_count(1536, 0.9) == 154
    assert kept_count(10, 0.999) == 1


@pytest.mark.parametrize("k", [0, 5])
def test_impossible_k_is_refused(k):
    with pytest.raises(InputError, match="k="):
        select_top_k(torch.zeros(1, 4), k)


def test_no_tokens():
    assert select_top_k(torch.zeros(0, 4), 2).shape == (0, 4)


def test_gradients_do_not_get_in_the_way():
    assert select_top_k(torch.rand(3, 8, requires_grad=True), 2).sum() == 6


@settings(max_examples=200, deadline=None)
@given(scores, st.data())
def test_the_path_of_other_devices_selects_the_same(rows, data):
    score = torch.tensor(rows, dtype=torch.float32)
    k = data.draw(st.integers(1, len(rows[0])))
    kth = torch.topk(score, k, dim=-1, sorted=True).values[:, -1:]
    assert torch.equal(_break_ties(score, kth, k), select_top_k(score, k))
