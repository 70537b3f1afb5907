"""Samples by cell and metric."""

import numpy as np
import pandas as pd
import pytest

from suite.report.samples import Samples

A, B = ({"cell_id": cell, "metric": "acc", "filter": "none"} for cell in "ab")


def samples(*rows):
    return Samples(pd.DataFrame(rows, columns=["cell_id", "metric", "doc_id", "value"]))


def test_documents_are_sorted_and_shared():
    found = samples(("a", "acc", "2", 0.2), ("a", "acc", "10", 0.1), ("b", "acc", "10", 0.3), ("b", "acc", "2", 0.4))
    first, second = found.of(A), found.of(B)
    assert first.documents is second.documents
    assert first.documents.ids == ("10", "2")
    assert (first.values.tolist(), second.values.tolist()) == ([0.1, 0.2], [0.3, 0.4])
    assert first.weights.tolist() == [1.0, 1.0]
    other = samples(("a", "acc", "1", 0.0), ("b", "acc", "2", 0.0))
    assert other.of(A).documents is not other.of(B).documents


def test_weights_are_those_of_the_documents():
    weighted = [("a", "acc", "1", 5.0), ("a", "acc", "2", 6.0), ("a", "acc.weight", "2", 3.0)]
    assert samples(*weighted, ("a", "acc.weight", "1", 2.0)).of(A).weights.tolist() == [2.0, 3.0]
    assert samples(*weighted, ("a", "acc.weight", "9", 2.0)).of(A).weights == pytest.approx([np.nan, 3.0], nan_ok=True)


def test_the_metric_of_the_filter_comes_first():
    found = samples(("a", "acc", "1", 0.0), ("a", "acc,strict", "1", 1.0))
    assert found.of(A | {"filter": "strict"}).values.tolist() == [1.0]
    assert found.of(A).values.tolist() == [0.0]
    assert found.of(B) is None


def test_a_document_twice_is_no_sample_and_an_item_without_a_value_neither():
    assert samples(("a", "acc", "1", 0.0), ("a", "acc", "1", 1.0)).of(A) is None
    assert samples(("a", "acc", "1", 0.0), ("a", "acc", "2", np.nan)).of(A).documents.ids == ("1",)


def test_a_template_is_resampled_as_one():
    found = samples(("a", "acc", "t/2", 0.0), ("a", "acc", "t/1", 0.0), ("a", "acc", "x", 0.0)).of(A)
    assert found.documents.groups == ["t", "t", "x"]
