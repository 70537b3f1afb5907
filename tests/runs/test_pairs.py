"""Two cells' samples, paired by document in one place for accuracy.csv and groups.csv."""

import pytest

from suite.runs.view.pairs import paired

OWN = {"acc": {"t/1": 1.0, "a": 0.0}, "ppl": {"a": 3.0}, "ppl.weight": {"a": 2.0}}


def test_values_weights_and_what_is_resampled_in_the_order_of_the_documents():
    base = {"acc": {"a": 1.0, "t/1": 0.0}, "ppl": {"a": 5.0}}
    assert paired(OWN, base, "acc", "none") == ([[0.0, 1.0], [1.0, 0.0]], [[1.0, 1.0]] * 2, ["a", "t"])
    assert paired(OWN, base, "ppl", "none") == ([[3.0], [5.0]], [[2.0], [1.0]], ["a"])


def test_the_filter_is_meant_where_samples_name_it():
    strict = {"acc": {"a": 0.0}, "acc,strict": {"a": 1.0}}
    assert paired(strict, strict, "acc", "strict").values == [[1.0], [1.0]]
    assert paired(strict, {"acc": {"a": 1.0}}, "acc", "strict").values == [[0.0], [1.0]]


@pytest.mark.parametrize("base", [{}, {"acc": {"a": 1.0}}, {"acc": {"a": 1.0, "b": 0.0}}])
def test_other_documents_are_no_pair(base):
    assert paired(OWN, base, "acc", "none") is None
