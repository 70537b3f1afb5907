"""Thresholds of several sites, moments and factors, against plain torch on the activations of a tiny model."""

import dataclasses

import pytest
import torch

from suite import attach, fit
from suite.errors import CellError, InputError
from suite.fitting.artifacts import load_fit, save_fit
from suite.fitting.keys import ESTIMATORS, key_of
from suite.fitting.moments import low_rank
from suite.fitting.windows import make_windows
from suite.modeling.gated_mlp import find_gated_mlps
from suite.registry import get_method
from tests.conftest import D_FF, D_MODEL
from tests.fitting.conftest import flip, loaded
from tests.modeling.site_methods import Allocated, Chess, Gated, Griffin, Static, Teal, TealInput, Undeclared
from tests.modeling.test_sites import masked_by_hand


def dense_inputs(model, windows):
    """Inputs of both layers' MLPs for all tokens, (n_tokens, d_model) each, one window at a time, the model dense."""
    found, handles = [[], []], []
    for layer, block in enumerate(model.model.layers):
        keep = lambda module, args, layer=layer: found[layer].append(args[0][0])  # noqa: E731
        handles.append(block.mlp.register_forward_pre_hook(keep))
    with torch.no_grad():
        for window in windows:
            model(torch.tensor([window]))
    for handle in handles:
        handle.remove()
    return [torch.cat(rows) for rows in found]


def test_every_site_and_layer_gets_its_quantile_behind_the_sparse_ones_before_it(tmp_path, text):
    model, method = loaded(tmp_path), Teal(sparsity=0.6)
    made = fit(model, method, text)
    assert made.thresholds.shape == (4,)
    order = [("mlp.input", 0), ("mlp.neurons", 0), ("mlp.input", 1), ("mlp.neurons", 1)]  # of the forward pass
    windows, thresholds = make_windows(text, model.tokenizer, 0).fit, {}
    for place in order:
        seen = []

        def keep(site, layer, x, place=place, seen=seen):
            if (site, layer) == place:
                seen.append(x.abs().flatten())
            return x.abs() >= thresholds.get((site, layer), -torch.inf)

        for window in windows:
            masked_by_hand(model.model, torch.tensor([window]), ("mlp.input", "mlp.neurons"), keep)
        # gate_proj and up_proj see the same vector: twice as many scores, the same quantile
        thresholds[place] = float(torch.cat(seen).quantile(0.6))
    expected = [thresholds[site, layer] for site in method.sites for layer in range(2)]
    torch.testing.assert_close(made.thresholds, torch.tensor(expected), rtol=5e-3, atol=0)
    assert len(made.meta["held_out_sparsity"]) == 4
    assert made.meta["held_out_sparsity"] == pytest.approx([0.6] * 4, abs=0.03)  # 1024 held-out tokens
    with attach(model.model, method, load_fit(save_fit(made, tmp_path))) as attached:
        model.model(torch.tensor([windows[0]]))
    assert [row.threshold for row in attached.sparsity()] == pytest.approx(
        made.thresholds.view(2, 2).T.flatten().tolist()
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_thresholds_follow_the_allocation(tmp_path, text, estimator):
    much = dataclasses.replace(text, max_tokens=16384)
    made = fit(loaded(tmp_path), Allocated(sparsity=0.5), much, estimator=estimator)
    bare = fit(loaded(tmp_path), Allocated(sparsity=0.5, slope=0.25), text, estimator=estimator)
    assert [float(value) == -torch.inf for value in bare.thresholds] == [False, True, False, False]
    # the sites one after the other; the dense estimators realise less than they are asked for
    assert made.meta["held_out_sparsity"] == pytest.approx(
        [0.25, 0.5, 0.15, 0.4], abs=0.02 if estimator == "calibrated" else 0.08
    )


@pytest.mark.parametrize("estimator", ["mean-kth", "pooled-quantile"])
def test_other_estimators_take_dense_scores_of_every_site(tmp_path, text, estimator):
    model = loaded(tmp_path, "gemma2")
    made = fit(model, TealInput(sparsity=0.5), text, estimator=estimator)
    inputs = dense_inputs(model.model, make_windows(text, model.tokenizer, 0).fit)
    if estimator == "mean-kth":
        expected = [x.abs().topk(D_MODEL // 2).values[:, -1].mean() for x in inputs]
    else:
        expected = [x.abs().quantile(0.5) for x in inputs]
    torch.testing.assert_close(made.thresholds, torch.tensor(expected), rtol=5e-3, atol=0)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_moments_are_mean_squares_and_reach_the_score_in_both_modes(tmp_path, text, architecture):
    model, method = loaded(tmp_path, architecture), Chess(sparsity=0.6)
    text = dataclasses.replace(text, max_tokens=4000)  # 3000 to fit on: the last window is padded
    made = load_fit(save_fit(fit(model, method, text), tmp_path))
    assert made.extra_bytes == 2 * D_FF * 4
    windows = make_windows(text, model.tokenizer, 0).fit
    rms = []
    for mlp, x in zip(find_gated_mlps(model.model), dense_inputs(model.model, windows), strict=True):
        rms.append((x @ mlp.weights()[1].T).square().mean(0).sqrt().detach())
    torch.testing.assert_close(made.extras["moments.up"].sqrt(), torch.stack(rms), rtol=1e-4, atol=0)
    ids, acts = torch.tensor([windows[0]]), {}
    for mode in ("ideal", "practical"):

        def keep(_site, layer, v, mode=mode):
            score = acts[layer] * rms[layer]
            if mode == "practical":
                return score >= made.thresholds[layer]
            return score.argsort(-1, descending=True).argsort(-1) < D_FF - 28

        def record(layer):
            return lambda module, args, output: acts.update({layer: output.abs()})

        names = "activation_fn" if architecture == "phi3" else "act_fn"
        handles = [
            getattr(block.mlp, names).register_forward_hook(record(layer))
            for layer, block in enumerate(model.model.model.layers)
        ]
        by_hand, kept = masked_by_hand(model.model, ids, ("mlp.neurons",), keep)
        for handle in handles:
            handle.remove()
        with attach(model.model, method, made, mode=mode) as attached, torch.inference_mode():
            ours = model.model(ids).logits
        torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-4)
        for row in attached.sparsity():
            share = kept["mlp.neurons", row.layer] / (ids.numel() * D_FF)
            assert row.sparsity_realized == pytest.approx(1 - share, abs=2e-4)


def test_a_factor_is_the_best_of_its_rank_on_the_inputs_that_occur(tmp_path, text):
    """Eckart and Young on the inputs themselves, not on their second moments."""
    model, method = loaded(tmp_path), Gated(sparsity=0.5, rank=6)
    made = fit(model, method, text)
    assert made.extra_bytes == 2 * 4 * (6 * (D_MODEL + D_FF) + D_FF)
    inputs = dense_inputs(model.model, make_windows(text, model.tokenizer, 0).fit)
    for mlp, x in zip(find_gated_mlps(model.model), inputs, strict=True):
        factor = made.calibrated(torch.device("cpu"))[mlp.layer].factors["gate"]
        gate = (x @ mlp.weights()[0].T).detach()
        left, values, right = torch.linalg.svd(gate, full_matrices=False)
        best = (left[:, :6] * values[:6]) @ right[:6]
        found = factor.apply(x)
        assert (gate - found).square().sum() <= 1.001 * (gate - best).square().sum()
        assert not torch.allclose(found, gate, atol=0.1)
        act = torch.nn.functional.silu
        residual = (act(gate) - act(found)).square().mean(0)
        torch.testing.assert_close(factor.residual, residual, rtol=1e-3, atol=1e-6)


def test_a_score_of_a_factor_sees_the_input_of_its_own_layer(tmp_path, text):
    model, method = loaded(tmp_path), Gated(sparsity=0.5, rank=6)
    made, ids, seen = fit(model, method, text), torch.arange(3, 40)[None], {}
    factors = [layer.factors["gate"] for layer in made.calibrated(torch.device("cpu"))]

    def keep(_site, layer, v):
        x, u = seen[layer]
        act = torch.nn.functional.silu(x @ (factors[layer].u @ factors[layer].v.T).T)
        score = u.abs() * (act.square() + factors[layer].residual).sqrt()
        return score.argsort(-1, descending=True).argsort(-1) < D_FF // 2

    handles = [
        block.mlp.up_proj.register_forward_hook(
            lambda _, args, output, layer=layer: seen.update({layer: (*args, output)})
        )
        for layer, block in enumerate(model.model.model.layers)
    ]
    by_hand, _ = masked_by_hand(model.model, ids, ("mlp.neurons",), keep)
    for handle in handles:
        handle.remove()
    with attach(model.model, method, made, mode="ideal"), torch.inference_mode():
        ours = model.model(ids).logits
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-4)
    with attach(model.model, method, made) as attached:
        model.model(ids)
    assert 0.3 < attached.realised < 0.7


def test_the_full_rank_is_the_projection():
    generator = torch.Generator().manual_seed(3)
    weight, x = (torch.randn(n, 12, generator=generator) for n in (20, 500))
    factor = low_rank(weight, x.T @ x / 500, 12)
    torch.testing.assert_close(factor.u @ factor.v.T, weight, rtol=1e-3, atol=1e-3)


def test_keys_name_what_a_method_asks_for_and_only_that(tmp_path):
    rest = ("calibrated", "weights", "text", 4096, 0, "float32")
    keys = {key_of(method, *rest) for method in (Teal(), Chess(), Gated(), Static())}
    for cls, changes in (
        (Teal, {"sites": ("mlp.input",)}),
        (Chess, {"moments": ("act",)}),
        (Gated, {"factors": {"up": 8}}),
    ):
        changed = type(cls.__name__, (cls,), {"__module__": cls.__module__, **changes})
        keys.add(key_of(changed(), *rest))
    keys.add(key_of(Gated(rank=9), *rest))
    assert len(keys) == 8
    for name, value in (("fit_rounds", 2), ("predictor_input", "block")):  # properties of a class, no parameters
        changed = type(
            "Chess", (Chess,), {name: property(lambda _, value=value: value), "__module__": Chess.__module__}
        )
        keys.add(key_of(changed(), *rest))
    assert len(keys) == 10
    # as first published: fits are carried to machines with other code
    assert key_of(get_method("cats", sparsity=0.5), *rest).startswith("9fd4c0e54aa895a3")
    md = get_method("md-countdown", sparsity=0.5, fit_rounds=2, predictor_input="block")
    assert key_of(md, *rest).startswith("e2fe9b617e277290")
    plain = dataclasses.make_dataclass("Undeclared", [], bases=(Undeclared,), frozen=True, kw_only=True)
    plain.__module__, plain.__qualname__ = Undeclared.__module__, Undeclared.__qualname__
    plain.sites, plain.moments = ("mlp.neurons",), ()
    assert key_of(plain(), *rest) == key_of(Undeclared(), *rest)


def test_hash_covers_the_extras(tmp_path, text):
    made = fit(loaded(tmp_path), Chess(sparsity=0.5), text)
    changed = {"moments.up": made.extras["moments.up"] + 1}
    renamed = {"moments.act": made.extras["moments.up"]}
    others = [dataclasses.replace(made, extras=extras) for extras in ({}, changed, renamed)]
    assert len({fit.sha256 for fit in (made, *others)}) == 4
    path = save_fit(made, tmp_path)
    assert load_fit(path).sha256 == made.sha256
    flip(path)
    with pytest.raises(InputError, match="its hash differs"):
        load_fit(path)


def test_fits_that_do_not_hold_what_is_asked(tmp_path, text):
    model, method = loaded(tmp_path), Chess(sparsity=0.5)
    made = fit(model, method, text)
    narrow = dataclasses.replace(made, extras={"moments.up": made.extras["moments.up"][:, :40]})
    one = dataclasses.replace(made, extras={"moments.up": made.extras["moments.up"][:1]})
    bare = dataclasses.replace(made, extras={})
    for state, match in (
        (narrow, "40 moments of 'up', not 48"),
        (one, "moments of 1 layers, the model has 2"),
        (bare, "moments of 0 layers"),
        (dataclasses.replace(made, sparsity=0.6), "at sparsity 0.6, not of chess at 0.5"),
    ):
        for mode in ("ideal", "practical"):
            with pytest.raises(InputError, match=match), attach(model.model, method, state, mode=mode):
                model.model(torch.arange(3, 9)[None])
    other = dataclasses.replace(made, extras={"moments.act": made.extras["moments.up"]})
    with pytest.raises(InputError, match="holds no moments of 'up' in layer 0"):
        attach(model.model, method, other).__enter__()
    half = dataclasses.replace(made, meta={**made.meta, "dtype": "bfloat16"})
    with pytest.raises(InputError, match=r"is of bfloat16 weights, the model's are torch\.float32: fit anew"):
        attach(model.model, method, half).__enter__()
    gated = Gated(sparsity=0.5, rank=6)
    made = fit(model, gated, text)
    bare = {name: tensor for name, tensor in made.extras.items() if name.startswith("moments")}
    wide = made.extras | {"factor.gate.v": made.extras["factor.gate.v"][:, :31]}
    for extras, match in (
        (bare, "moments of 0 layers"),
        (wide, r"factor of 'gate' for layers of \(d_model, d_ff\) = \(31, 48\), the model's are \(32, 48\)"),
        (made.extras | {"factor.up.v": made.extras["factor.gate.v"]}, "lacks factor.up.u: fit anew"),
        ({name.replace("gate", "up"): tensor for name, tensor in made.extras.items()}, "no factor of 'gate'"),
    ):
        with pytest.raises(InputError, match=match):
            attach(model.model, gated, dataclasses.replace(made, extras=extras)).__enter__()
    short = dataclasses.replace(text, max_tokens=8)
    with pytest.raises(InputError, match="rank 7 of its factor of 'gate' is more than the 6 tokens it is fitted on"):
        fit(model, Gated(sparsity=0.5, rank=7), short)
    with pytest.raises(InputError, match="no threshold to fit"):
        fit(model, Griffin(sparsity=0.5), text)
    with pytest.raises(InputError, match="rank 33 of its factor of 'gate' must be 1 to d_model=32"):
        fit(model, Gated(sparsity=0.5, rank=33), text)
    with pytest.raises(InputError, match="leave one of them out"):
        attach(model.model, Static(sparsity=0.5), fit(model, Static(sparsity=0.5), text), mode="ideal").__enter__()


def test_moments_that_overflow_fail(tmp_path, text):
    model = loaded(tmp_path)
    weight = model.model.model.layers[1].mlp.up_proj.weight
    before = weight.data.clone()
    weight.data[3] = torch.nan
    try:
        with pytest.raises(CellError, match=r"moments\.up of layer 1 is NaN"):
            fit(model, Chess(sparsity=0.5), text)
    finally:
        weight.data = before
