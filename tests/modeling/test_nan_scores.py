"""NaN scores: of a method's own making they are refused in every mode; of NaN activations they reach the output."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from suite.errors import CellError
from suite.fitting.artifacts import Fit
from suite.methods.base import Method, Projection
from suite.modeling.attach import attach
from tests.conftest import tiny_model


@dataclass(frozen=True, kw_only=True)
class LogOfUp(Method):
    """NaN wherever the up projection is negative."""

    name: ClassVar[str] = "log-of-up"
    first_projection: ClassVar[Projection | None] = "up"

    def score(self, activations):
        return activations.up.log()


METHOD = LogOfUp(sparsity=0.5)
STATE = Fit(method=METHOD.name, sparsity=0.5, estimator="calibrated", thresholds=torch.zeros(2), key="ab" * 32)


def _run(model, ids, state):
    with attach(model, METHOD, state) as attached:
        model(ids)
        attached.reset()  # of the counters of neurons, which forgets no fault


@pytest.mark.parametrize("state", [None, STATE], ids=["ideal", "practical"])
def test_a_method_that_scores_nan_is_refused_in_both_modes(ids, state):
    model = tiny_model("llama")
    before = model(ids).logits
    with pytest.raises(CellError, match=r"log-of-up: scores of 24 tokens in layer 0 are NaN.*finite"):
        _run(model, ids, state)
    assert torch.equal(model(ids).logits, before)


def test_nan_of_the_activations_is_no_fault_of_the_method(ids):
    model = copy.deepcopy(tiny_model("llama"))
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[3] = torch.nan
    with attach(model, METHOD):
        assert model(ids).logits.isnan().any()
