"""Kept sets and spread of the coefficients, counted again by hand on tiny models."""

import numpy as np
import pytest
import torch

from suite.analysis.coefficients import analyse
from suite.errors import CellError, InputError
from suite.modeling.gated_mlp import find_gated_mlps
from suite.modeling.loading import load_model
from tests.runs.tiny_world import _SHAPE, ARCHITECTURES, nan_model, save_model

TEXTS = ["a text of some length, of letters", "another one, longer than the first one was", "short"]


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def loaded(request, tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("model"), ARCHITECTURES[request.param](**_SHAPE))
    return load_model(str(folder), "float32", "cpu")


def by_hand(loaded, n_prompt, n_new):
    """|act(g)|, |u|, |v| of every layer, shape (n_tokens, d_ff), from tokens chosen one at a time without a cache."""
    model, tokenizer = loaded.model, loaded.tokenizer
    rows = [ids for ids in (tokenizer(text)["input_ids"][:n_prompt] for text in TEXTS) if len(ids) == n_prompt]
    ids = torch.tensor(rows)
    with torch.no_grad():
        for _ in range(n_new):
            logits = model(ids).logits[:, -1]
            logits[:, model.generation_config.eos_token_id] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    seen = {}
    handles = [
        mlp.module.register_forward_pre_hook(lambda _, args, layer=mlp.layer: seen.update({layer: args[0]}))
        for mlp in find_gated_mlps(model)
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    found = []
    for mlp in find_gated_mlps(model):
        gate, up = mlp.gate_up(seen[mlp.layer][:, n_prompt:].reshape(-1, mlp.d_model))
        act = mlp.act(gate)
        found.append([x.detach().abs().numpy() for x in (act, up, act * up)])
    return found


def test_rates_are_those_of_sets_counted_by_hand(loaded):
    found = analyse(loaded, TEXTS, prompt_tokens=10, new_tokens=6, sparsities=[0.25, 0.5, 0.9])
    layers = by_hand(loaded, 10, 6)
    assert [(r["row_method"], r["sparsity"]) for r in found.cif_caf] == [
        (name, s) for name in ("cats", "m-countdown") for s in (0.25, 0.5, 0.9)
    ]
    for row in found.cif_caf:
        kept = {name: set() for name in "CMD"}
        n_all = 0
        for layer, quantities in enumerate(layers):
            d_ff = quantities[0].shape[1]
            k = d_ff - int(row["sparsity"] * d_ff)
            for name, values in zip("CMD", quantities, strict=True):
                for token, scores in enumerate(values):
                    kept[name] |= {(layer, token, int(i)) for i in np.argsort(-scores, kind="stable")[:k]}
            n_all += quantities[0].size
        direct = kept["D"]
        other, own = (kept["C"], kept["M"]) if row["row_method"] == "m-countdown" else (kept["M"], kept["C"])
        n_dead = n_all - len(direct)
        assert row["cif_alive"] == pytest.approx(len(direct - other) / len(direct))
        assert row["cif_dead"] == pytest.approx(len(other - direct) / n_dead)
        assert row["caf_alive"] == pytest.approx(len((direct - other) & own) / len(direct))
        assert row["caf_dead"] == pytest.approx(len((other - direct) - own) / n_dead)
        assert row["n_tokens"] == 2 * 6  # the third text is too short


def test_spread_and_mass_are_those_of_the_layer(loaded):
    found = analyse(loaded, TEXTS, prompt_tokens=10, new_tokens=6, sparsities=[0.5])
    rows = {(row["layer"], row["quantity"]): row for row in found.activations}
    assert len(rows) == 2 * 3
    for layer, (act, up, product) in enumerate(by_hand(loaded, 10, 6)):
        for name, values in (("abs_act", act), ("abs_up", up), ("abs_product", product)):
            row = rows[layer, name]
            # another batch shape rounds the inputs differently: a few ulp of fp32
            assert row["mean"] == pytest.approx(values.mean(), rel=1e-4)
            assert row["q50"] == pytest.approx(np.quantile(values, 0.5), rel=1e-3)
            assert row["q95"] == pytest.approx(np.quantile(values, 0.95), rel=1e-3)
            k = values.shape[1] - int(0.8 * values.shape[1])
            best = np.argsort(-values, axis=1, kind="stable")[:, :k]
            squares = product.astype(float) ** 2
            share = np.take_along_axis(squares, best, 1).sum(1) / squares.sum(1)
            assert row["mass_kept_at_80"] == pytest.approx(share.mean(), rel=1e-4)
        ideal = rows[layer, "abs_product"]["mass_kept_at_80"]
        assert all(rows[layer, name]["mass_kept_at_80"] <= ideal for name in ("abs_act", "abs_up"))


def test_no_text_long_enough_is_refused_and_nan_is_no_number(loaded, tmp_path):
    with pytest.raises(InputError, match="none of 3 texts has 4000 tokens; lower prompt_tokens"):
        analyse(loaded, TEXTS, prompt_tokens=4000, new_tokens=1, sparsities=[0.5])
    broken = load_model(str(nan_model(tmp_path)), "float32", "cpu")
    with pytest.raises(CellError, match="layer 0 is not finite"):
        analyse(broken, TEXTS, prompt_tokens=10, new_tokens=2, sparsities=[0.5])
