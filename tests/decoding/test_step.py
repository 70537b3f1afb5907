"""The decode step of our own against the model's own forward pass: every architecture, also past a window."""

from dataclasses import fields, replace

import pytest
import torch
import transformers
from torch import nn

from suite.decoding.families import FAMILIES, Family
from suite.decoding.step import DecodeModel
from suite.errors import InputError
from suite.modeling.gated_mlp import find_gated_mlps
from tests.conftest import _SHAPE, CONFIGS, D_FF


def build(architecture, **changes):
    torch.manual_seed(0)
    config = CONFIGS[architecture](**_SHAPE | {"max_position_embeddings": 1024} | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
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
    changes = {"sliding_window": 64} if architecture in ("gemma2", "gemma3", "mistral", "phi3") else {}
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


def test_caps_that_tell(monkeypatch):
    model = build("gemma2", attn_implementation="eager", attn_logit_softcapping=0.5, final_logit_softcapping=2.0)
    assert follow(model, DecodeModel(model, 32), prompt(6)) < 1e-4
    monkeypatch.setitem(FAMILIES, "gemma2", replace(FAMILIES["gemma2"], score_cap="no.such"))
    assert follow(model, DecodeModel(model, 32), prompt(6)) > 1e-2


def test_an_mlp_of_ones_own_is_used():
    model = build("llama")
    decode, mlp = DecodeModel(model, 32), find_gated_mlps(model)[0]
    decode.prefill(prompt(6))
    dense = decode.hidden(decode.dense)
    seen = []

    def half(layer, x, block):
        seen.append((layer, tuple(x.shape)))
        gate, up = decode.mlps[layer].gate_up(x)
        product = decode.mlps[layer].act(gate) * up
        product[..., : D_FF // 2] = 0
        return decode.mlps[layer].down(product)

    assert not torch.allclose(decode.hidden(half), dense, atol=1e-3)
    assert torch.equal(decode.hidden(decode.dense), dense)  # the cache is written anew at the same position
    assert seen == [(0, (1, mlp.d_model)), (1, (1, mlp.d_model))]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_an_mlp_gets_its_blocks_normed_input_too(architecture):
    """What `input_layernorm` of its block gives of the token, known before attention."""
    model, ids = build(architecture, attn_implementation="eager"), prompt(6)
    decode, expected, found = DecodeModel(model, 32), {}, []
    decode.prefill(ids)

    def dense(layer, x, block):
        found.append(block)
        return decode.dense(layer, x, block)

    with torch.inference_mode():
        decode.hidden(dense)
        for layer, block in enumerate(model.model.layers):
            block.input_layernorm.register_forward_hook(
                lambda _m, _a, out, n=layer: expected.__setitem__(n, out[:, -1])
            )
        model(input_ids=torch.cat([ids, decode.token[None]], 1), use_cache=False)
    assert len(found) == len(expected) == 2
    for layer, block in enumerate(found):
        torch.testing.assert_close(block, expected[layer], rtol=1e-4, atol=1e-4)  # fp32, at most a layer


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


def renamed(**parts):
    """A module with these submodules and attributes, and no others."""
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


class Renamed(nn.Module):
    """A model that keeps every part of another's, but its MLPs', under another name."""

    def __init__(self, model):
        super().__init__()
        inner, blocks = model.model, []
        for block in inner.layers:
            own = block.self_attn
            attention = renamed(
                query=own.q_proj, key=own.k_proj, value=own.v_proj, dense=own.o_proj, q_ln=own.q_norm, k_ln=own.k_norm,
                width=own.head_dim, softmax=renamed(scale=own.scaling),
                reach=own.sliding_window, turns=own.layer_type,
            )  # fmt: skip
            norms = {"ln_1": block.input_layernorm, "ln_2": block.post_attention_layernorm}
            norms |= {"ln_3": block.pre_feedforward_layernorm, "ln_4": block.post_feedforward_layernorm}
            blocks.append(renamed(mixer=attention, mlp=block.mlp, **norms))
        turn = inner.rotary_emb.forward
        rope = renamed(forward=lambda x, positions, turns: turn(x, positions, turns))
        self.trunk = renamed(
            wte=inner.embed_tokens, rope=rope, stack=renamed(layers=nn.ModuleList(blocks)), ln_f=inner.norm
        )
        self.unembed = model.lm_head
        old, self.config = model.config, transformers.PretrainedConfig(num_hidden_layers=2)
        self.config.model_type = "renamed"
        self.config.n_positions, self.config.n_kv = old.max_position_embeddings, old.num_key_value_heads
        self.config.ln_eps, self.config.soft_cap = old.rms_norm_eps, old.final_logit_softcapping
        self.forward = model.forward


RENAMED = Family(
    embedding="trunk.wte",
    rotary="trunk.rope",
    layers="trunk.stack.layers",
    last_norm="trunk.ln_f",
    head="unembed",
    context="config.n_positions",
    n_kv="config.n_kv",
    eps="config.ln_eps",
    logit_cap="config.soft_cap",
    attention="mixer",
    before_attention="ln_1",
    after_attention="ln_2",
    before_mlp="ln_3",
    after_mlp="ln_4",
    qkv=("query", "key", "value"),
    out="dense",
    head_norms=("q_ln", "k_ln"),
    head_dim="width",
    scale="softmax.scale",
    window="reach",
    rotation="turns",
    norm_offset=1.0,
)


def wrapped():
    """A cap and a window that tell, and two kinds of rotation."""
    model = build(
        "gemma3",
        attn_implementation="eager",
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=64,
        final_logit_softcapping=2.0,
    )
    return model, Renamed(model)


def test_an_architecture_of_other_names_needs_its_entry_alone(monkeypatch):
    monkeypatch.setitem(FAMILIES, "renamed", RENAMED)
    model, other = wrapped()
    assert follow(other, DecodeModel(other, 300), prompt(280)) < 1e-4
    ids = prompt(280)
    with torch.inference_mode():
        for one in (first := DecodeModel(model, 300), second := DecodeModel(other, 300)):
            one.prefill(ids)
        assert torch.equal(*(one.logits(one.hidden(one.dense)) for one in (first, second)))


NAMES = {field.name for field in fields(Family)} - {"norm_offset", "rotation", "score_cap"}


@pytest.mark.parametrize("field", sorted(NAMES))
def test_every_name_of_an_entry_is_read(monkeypatch, field):
    """A wrong one is refused in one line, or, where an architecture may lack such a part, it changes the logits."""
    wrong = {"qkv": ("query", "no.such", "value"), "head_norms": ("q_ln", "no.such")}.get(field, "no.such")
    monkeypatch.setitem(FAMILIES, "renamed", replace(RENAMED, **{field: wrong}))
    _, other = wrapped()
    if field in ("logit_cap", "window"):
        assert follow(other, DecodeModel(other, 300), prompt(280)) > 1e-2
        return
    with pytest.raises(
        InputError, match=r"has no no.such: correct its family in suite/decoding/families\.py"
    ) as refused:
        DecodeModel(other, 32)
    assert "\n" not in str(refused.value)


def test_every_family_has_a_tiny_twin():
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)
