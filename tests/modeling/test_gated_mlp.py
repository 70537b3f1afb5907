"""The view of each architecture's MLP, and models that have none."""

import pytest
import torch
import transformers

from suite.errors import InputError
from suite.modeling.gated_mlp import find_gated_mlps
from tests.conftest import CONFIGS, D_FF, D_MODEL, tiny_model

FUSED = {"phi3"}
TANH = {"gemma2", "gemma3"}


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_view_recomposes_the_mlp_bit_for_bit(architecture):
    model = tiny_model(architecture)
    mlps = find_gated_mlps(model)
    assert [mlp.layer for mlp in mlps] == [0, 1]
    x = torch.randn(2, 3, D_MODEL)
    for mlp in mlps:
        assert (mlp.d_model, mlp.d_ff) == (D_MODEL, D_FF)
        assert mlp.fused == (architecture in FUSED)
        assert mlp.activation == ("gelu_tanh" if architecture in TANH else "silu")
        assert model.get_submodule(mlp.module_name) is mlp.module
        assert not mlp.has_bias()
        with torch.inference_mode():
            gate, up = mlp.gate_up(x)
            assert torch.equal(mlp.down(mlp.act(gate) * up), mlp.module(x))
            w_gate, w_up, w_down = mlp.weights()
            # eps * sqrt(reduction length), a few ulp of values of about 1
            close = {"rtol": 0, "atol": 16 * torch.finfo(torch.float32).eps * D_MODEL**0.5}
            torch.testing.assert_close(x @ w_gate.T, gate, **close)
            torch.testing.assert_close(x @ w_up.T, up, **close)
            torch.testing.assert_close(mlp.norm2("down", "columns"), w_down.norm(dim=0).square(), rtol=1e-5, atol=0)


def test_weights_of_a_fused_mlp_are_views():
    mlp = find_gated_mlps(tiny_model("phi3"))[0]
    gate, up, _ = mlp.weights()
    whole = mlp.module.gate_up_proj.weight
    assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_bias_is_seen():
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8, mlp_bias=True
    )
    assert find_gated_mlps(transformers.LlamaForCausalLM(config))[0].has_bias()


def gpt2():
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32)
    return transformers.GPT2LMHeadModel(config)


def llama_with(**changes):
    shape = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 8,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | changes))


def one_layer_without():
    model = llama_with()
    model.model.layers[1].mlp = torch.nn.Identity()
    return model


def other_formula():
    model = llama_with()
    for layer in model.model.layers:
        layer.mlp.forward = lambda x: 2 * x
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (gpt2, "GPT2LMHeadModel has no gated MLP"),
        (lambda: torch.nn.Linear(2, 2), "Linear"),
        (lambda: llama_with(hidden_act="gelu"), "activation GELUActivation"),
        (lambda: llama_with(hidden_act="relu"), "only SiLU and GELU-tanh"),
        (one_layer_without, "1 of 2 layers"),
        (other_formula, "LlamaMLP does not compute"),
    ],
)
def test_models_that_are_refused_by_name(make, match):
    with pytest.raises(InputError, match=match) as refused:
        find_gated_mlps(make())
    assert "\n" not in str(refused.value)
