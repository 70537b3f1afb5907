"""The decode step of our own against the model's own forward pass: every architecture, also past a window."""

import pytest
import torch

from suite.decoding.families import FAMILIES
from suite.decoding.step import DecodeModel
from suite.errors import InputError
from suite.modeling.gated_mlp import find_gated_mlps
from tests.conftest import _SHAPE, CONFIGS, D_FF


def build(architecture, **changes):
    torch.manual_seed(0)
    config = CONFIGS[architecture](**_SHAPE | {"max_position_embeddings": 1024} | changes)
    model = __import__("transformers").AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases that do something
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def prompt(n_tokens, seed=1):
    return torch.randint(3, 64, (1, n_tokens), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def follow(model, decode, ids, n_steps=4):
    """Largest difference of logits between the step and the model, each on the step's own tokens."""
    first = decode.prefill(ids)
    worst = float((first - model(input_ids=ids).logits[:, -1]).abs().max())
    for _ in range(n_steps):
        ids = torch.cat([ids, decode.token[None]], 1)
        expected = model(input_ids=ids).logits[:, -1]
        got = decode.logits(decode.hidden(decode.dense))
        worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
        decode.step(decode.dense)
        assert int(decode.token) == int(got.argmax())
    return worst


@pytest.mark.parametrize("architecture", CONFIGS)
def test_step_equals_the_model(architecture):
    """Cache of two chunks; a prompt longer than a chunk, then a shorter one over its leftovers."""
    changes = {"sliding_window": 64} if architecture in ("gemma2", "gemma3") else {}
    model = build(architecture, attn_implementation="eager", **changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decode = DecodeModel(model, 300)
    for n_tokens in (280, 5):
        assert follow(model, decode, prompt(n_tokens)) < 1e-4  # fp32, 2 layers
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_partial_rotation_and_scaled_positions():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    model = build("phi3", rope_parameters=rope)
    assert follow(model, DecodeModel(model, 32), prompt(6)) < 1e-4


def test_biases_of_all_projections():
    model = build("llama", mlp_bias=True, attention_bias=True)
    assert follow(model, DecodeModel(model, 32), prompt(6)) < 1e-4


def test_an_mlp_of_ones_own_is_used():
    model = build("llama")
    decode, mlp = DecodeModel(model, 32), find_gated_mlps(model)[0]
    decode.prefill(prompt(6))
    dense = decode.hidden(decode.dense)
    seen = []

    def half(layer, x):
        seen.append((layer, tuple(x.shape)))
        gate, up = decode.mlps[layer].gate_up(x)
        product = decode.mlps[layer].act(gate) * up
        product[..., : D_FF // 2] = 0
        return decode.mlps[layer].down(product)

    assert not torch.allclose(decode.hidden(half), dense, atol=1e-3)
    assert torch.equal(decode.hidden(decode.dense), dense)  # the cache is written anew at the same position
    assert seen == [(0, (1, mlp.d_model)), (1, (1, mlp.d_model))]


def test_too_long_is_refused():
    model = build("llama", max_position_embeddings=16)
    with pytest.raises(InputError, match="over the context of 16"):
        DecodeModel(model, 17)
    with pytest.raises(InputError, match="must be 1 to 255"):
        DecodeModel(model, 16).prefill(prompt(256))


def test_an_architecture_without_an_entry_is_refused_in_one_line():
    model = build("llama")
    model.config.model_type = "llamma"
    with pytest.raises(InputError, match="architecture 'llamma' has no decode step; did you mean 'llama'") as refused:
        DecodeModel(model, 32)
    assert "\n" not in str(refused.value)


def test_every_family_has_a_tiny_twin():
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)
