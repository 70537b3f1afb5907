"""Weights that a method reads, by its contract."""

import pytest

from suite.methods.cost import calibrated_bytes, low_rank_share, read_share, share_of_sites, ternary_share
from suite.registry import method_class

OWN = "tests.modeling.site_methods:"


@pytest.mark.parametrize(
    ("method", "realised", "share"),
    [
        ("dense", 0.0, 1.0),
        ("cats", 0.9, 0.4),
        ("m-countdown", 0.75, 0.5),
        ("d-countdown", 0.9, 0.1),
        ("dejavu", 0.5, 0.5),
        (OWN + "Teal", 0.5, 0.5),  # all three masked
        (OWN + "TealInput", 0.75, 0.5),  # down is read whole
        ("tests.methods.test_cost:Both", 0.75, 0.75),
    ],
)
def test_share_of_the_dense_layer(method, realised, share):
    assert read_share(method_class(method), realised) == pytest.approx(share)


def test_sites_of_different_sparsity():
    teal, neurons = method_class(OWN + "Teal"), method_class("cats")
    assert share_of_sites(teal, {"mlp.input": 0.25, "mlp.neurons": 0.5}) == pytest.approx((0.75 * 2 + 0.5) / 3)
    assert share_of_sites(neurons, {"mlp.neurons": 0.9}) == pytest.approx(0.4)
    known = type("Known", (teal,), {"first_projection": None})  # neurons known before gate and up are computed
    assert share_of_sites(known, {"mlp.input": 0.25, "mlp.neurons": 0.5}) == pytest.approx((0.75 * 2 * 0.5 + 0.5) / 3)


def test_a_given_set_and_predictors():
    assert read_share(None, 0.9) == pytest.approx(0.1)
    assert low_rank_share(512, 4096, 14336) == pytest.approx(512 * (1 / 4096 + 1 / 14336) / 3)
    assert ternary_share("bfloat16") == pytest.approx(2 * ternary_share("float32")) == pytest.approx(2 / 8 / 6)


@pytest.mark.parametrize(("quantity", "width"), [("input", 32), ("block", 32), ("act", 48)])
def test_bytes_of_moments_of_what_is_as_wide_as_the_model_or_the_layer(quantity, width):
    cls = type("Asks", (method_class("cats"),), {"moments": (quantity,)})
    assert calibrated_bytes(cls(), 32, 48, "bfloat16") == 4 * width


class Both(method_class("cats")):
    """Computes gate and up densely, then ranks."""

    first_projection = "both"
