"""A fit of another parameter, rank or size is refused; what no method chooses stays out of the rows' identity."""

from dataclasses import replace

import pytest
import torch

from suite.config import build_config
from suite.errors import CellError, InputError
from suite.fitting.moments import _refuse_not_finite
from suite.modeling.attach import attach
from suite.registry import get_method
from suite.runs.cells.accuracy import expand
from suite.speed.case import needed_bytes
from suite.speed.expand import make_cases
from tests.conftest import D_FF, predictor_fit, random_fit, tiny_model
from tests.runs.fakes import FakeWorld


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"rank": 8}, "has a factor of 'gate' of rank 4, not 8"),
        ({"rank": 4, "predictor_input": "block"}, "has predictor_input 'mlp', the method 'block'"),
        ({"rank": 4, "fit_rounds": 2}, "has fit_rounds 1, the method 2"),
    ],
)
def test_a_fit_of_another_parameter_is_refused(params, message):
    made = get_method("md-countdown", sparsity=0.5, rank=4)
    fit = random_fit(made)
    if "rank" not in message:
        fit = replace(fit, meta={"parameters": made.parameters()})
    model = tiny_model("llama")
    with attach(model, made, fit, mode="ideal"):
        pass
    other = get_method("md-countdown", sparsity=0.5, **params)
    with pytest.raises(InputError, match=message), attach(model, other, fit, mode="ideal"):
        pass


def test_residuals_of_another_width_are_refused():
    method = get_method("md-countdown", sparsity=0.5, rank=4)
    fit = random_fit(method)
    fit = replace(fit, extras=fit.extras | {"factor.gate.residual": torch.ones(2, D_FF - 1)})
    with (
        pytest.raises(InputError, match=f"has {D_FF - 1} residuals of 'gate', not {D_FF}"),
        attach(tiny_model("llama"), method, fit, mode="ideal"),
    ):
        pass


def cells_of(methods, **predictor):
    block = {"methods": methods, "modes": ["practical"], "sparsities": [0.5], "tasks": ["t1"]}
    config = {"name": "x", "models": [{"id": "a"}], "accuracy": [block], "predictor": predictor}
    return expand(build_config(config, "test"), FakeWorld())


def test_columns_of_a_choice_are_empty_where_there_is_none():
    names = ("predictor_input", "exact_projection")
    found = {
        (cell.method, cell.columns["predictor"]): tuple(cell.columns[name] for name in names)
        for cell in cells_of(["cats", "d-countdown", "md-countdown"], predictors=["low-rank", "gated"])
    }
    assert found == {
        ("cats", None): (None, None),
        ("d-countdown", "low-rank"): (None, None),
        ("d-countdown", "gated"): ("mlp", None),
        ("md-countdown", None): ("mlp", "up"),
    }


def test_a_predictor_in_closed_form_is_for_methods_and_estimators_that_it_suits():
    kinds = {"predictors": ["low-rank", "gated"], "estimators": ["calibrated", "zero"]}
    found = [(c.method, c.fit.options.predictor, c.fit.estimator) for c in cells_of(["dejavu", "d-countdown"], **kinds)]
    assert sorted(found) == [
        ("d-countdown", "gated", "calibrated"),
        ("d-countdown", "low-rank", "calibrated"),
        ("d-countdown", "low-rank", "zero"),
        ("dejavu", "low-rank", "calibrated"),
        ("dejavu", "low-rank", "zero"),
    ]
    with pytest.raises(InputError, match="method 'dejavu' has no practical mode with predictors gated"):
        cells_of(["dejavu"], predictors=["gated"])


def test_settings_that_no_column_tells_apart_are_refused():
    one, two = ({"name": "md-countdown", "params": {"fit_rounds": n}} for n in (1, 2))
    assert len(cells_of([one, "cats"])) == 2
    with pytest.raises(InputError, match=r"md-countdown practical 0\.5 .* differ in fit_rounds alone"):
        cells_of([one, two])


def test_moments_that_are_not_finite_fail_before_their_eigenvectors():
    with pytest.raises(CellError, match="gram of layer 1 is NaN or infinite"):
        _refuse_not_finite({"gram": torch.stack([torch.eye(2), torch.full((2, 2), torch.inf)])})


def test_bytes_of_a_speed_case_count_the_factor_of_each_neuron():
    plain, scaled = make_cases(["embedded"], ["m-countdown", "m-countdown-cw"], [0.5])
    assert needed_bytes(scaled, 0.5) - needed_bytes(plain, 0.5) == 4 * scaled.d_ff


def test_a_gated_predictor_of_another_activation_is_refused():
    state = replace(predictor_fit(kind="gated"), activation="gelu_tanh")
    with (
        pytest.raises(InputError, match="is for activation gelu_tanh, the model's is silu: fit anew"),
        attach(tiny_model("llama"), get_method("d-countdown", sparsity=0.5), state),
    ):
        pass
