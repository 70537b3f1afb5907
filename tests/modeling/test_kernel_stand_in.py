"""Kernels stand in only for modules whose forward pass they reproduce; all else is masked, or refused by name."""

import copy

import pytest
import torch
from torch import nn

from suite.errors import InputError
from suite.modeling import attach as attach_module
from suite.modeling.attach import attach
from suite.modeling.decode import has_kernel
from suite.modeling.gated_mlp import find_gated_mlps
from suite.registry import get_method
from tests.conftest import decode_method, decode_state, tiny_model

METHOD = get_method("m-countdown", sparsity=0.5)


class Adapter(nn.Linear):
    """As adapters do it: ``weight`` is the base's, the forward pass adds to it."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


def adapter(mlp):
    down = mlp.down_proj
    mlp.down_proj = Adapter(down.in_features, down.out_features, bias=False)
    mlp.down_proj.weight = down.weight


def hook(mlp):
    mlp.up_proj.register_forward_hook(lambda module, args, output: 2 * output)


def pre_hook(mlp):
    mlp.gate_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def patched(mlp):
    original = mlp.down_proj.forward
    mlp.down_proj.forward = lambda v: original(v) + 1


def watched_activation(mlp):
    mlp.act_fn.register_forward_hook(lambda module, args, output: None)  # the kernels would leave it unseen


def whole_patched(mlp):
    original = mlp.forward
    mlp.forward = lambda x: original(x)


class Plus(nn.Module):
    def forward(self, weight):
        return weight + 1


def parametrised(mlp):
    nn.utils.parametrize.register_parametrization(mlp.down_proj, "weight", Plus())


class OwnMLP(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


CHANGES = {
    adapter: "mlp.down_proj is a Adapter",
    hook: "mlp.up_proj has a forward hook",
    pre_hook: "mlp.gate_proj has a forward hook",
    patched: "forward pass of model.layers.1.mlp.down_proj is replaced",
    watched_activation: "mlp.act_fn has a forward hook",
    whole_patched: "forward pass of model.layers.1.mlp is replaced",
    parametrised: "mlp.down_proj is a ParametrizedLinear",
}


def step(model, backend):
    with attach(model, METHOD, decode_state("m-countdown"), backend=backend), torch.inference_mode():
        return model(input_ids=torch.tensor([[7]])).logits


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_not_the_formula_of_the_weights_is_masked(change):
    model = copy.deepcopy(tiny_model("llama"))
    change(model.model.layers[1].mlp)
    assert torch.equal(step(model, "auto"), step(model, "masked"))
    with pytest.raises(InputError, match=CHANGES[change]):
        step(model, "numba")


def test_an_mlp_of_another_class_is_masked():
    model = copy.deepcopy(tiny_model("llama"))
    model.model.layers[1].mlp = OwnMLP(model.model.layers[1].mlp)
    assert torch.equal(step(model, "auto"), step(model, "masked"))
    with pytest.raises(InputError, match="is a OwnMLP"):
        step(model, "numba")


@pytest.mark.parametrize("fault", ["output", "set"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cats", ""),
        ("m-countdown", ""),
        ("m-countdown-cw", ""),
        ("chess", ""),
        ("d-countdown", "low-rank"),
        ("md-countdown", "up mlp"),
        ("md-countdown", "gate block"),
        ("d-countdown", "gated block"),
    ],
)
def test_a_kernel_that_computes_something_else_is_found_at_attach(name, kind, fault, monkeypatch):
    """One layer of wrong outputs, or of another threshold than the state's."""
    make = attach_module.decode_kernels

    def broken(model, method, thresholds, predictor, **options):
        if fault == "set":
            return make(model, method, thresholds + 5, predictor, **options)
        kernels = make(model, method, thresholds, predictor, **options)
        run = kernels.run
        kernels.run = lambda layer, *x: run(layer, *x) * (1 + 1e-3 * layer)
        return kernels

    model, method, state = tiny_model("llama"), decode_method(name, kind), decode_state(name, kind)
    with attach(model, method, state, backend="numba"):  # the right kernels pass
        pass
    monkeypatch.setattr(attach_module, "decode_kernels", broken)
    with pytest.raises(InputError, match=r"does not compute what model\.layers\.\d\.mlp does; use backend masked"):
        attach(model, method, state, backend="numba").__enter__()
    with attach(model, method, state, backend="auto"), torch.inference_mode():
        auto = model(input_ids=torch.tensor([[7]])).logits
    with attach(model, method, state, backend="masked"), torch.inference_mode():
        assert torch.equal(model(input_ids=torch.tensor([[7]])).logits, auto)


def test_a_factor_that_is_not_the_one_of_the_score_has_no_kernel():
    name = "tests.modeling.site_methods:SaysAnother"
    model, method, state = tiny_model("llama"), get_method(name, sparsity=0.5), decode_state(name)
    with pytest.raises(InputError, match="do not compute the score of says-another"):
        attach(model, method, state, backend="numba").__enter__()
    name = "tests.modeling.site_methods:Gated"  # does not say that it has one
    assert not has_kernel(get_method(name, sparsity=0.5))


@pytest.mark.parametrize("change", [adapter, lambda mlp: mlp.down_proj.register_forward_hook(lambda m, a, y: 2 * y)])
def test_norms_of_columns_are_those_that_the_forward_pass_applies(change):
    """s-countdown ranks by them: an adapter on down_proj changes the columns, not the weight."""
    model = copy.deepcopy(tiny_model("llama"))
    plain = find_gated_mlps(model)[0].norm2("down", "columns")
    change(model.model.layers[0].mlp)
    found = find_gated_mlps(model)[0]
    columns = found.down(torch.eye(found.d_ff)).detach()
    assert torch.allclose(found.norm2("down", "columns"), columns.square().sum(-1), rtol=1e-5)
    assert not torch.allclose(found.norm2("down", "columns"), plain, rtol=1e-2)
