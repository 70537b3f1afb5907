"""Gated predictors, and what reads the block's input, against numpy in fp64 from activations and weights."""

import dataclasses

import numpy as np
import pytest
import torch

from suite import attach, fit, get_method
from suite.errors import InputError
from suite.fitting.artifacts import load_fit, save_fit
from suite.fitting.keys import training_key
from suite.fitting.options import PredictorOptions
from suite.fitting.predictor import Wanted, fit_predictors
from suite.fitting.stream import mlp_inputs
from suite.fitting.windows import make_predictor_windows, make_windows
from suite.methods.cost import gated_share, low_rank_share
from suite.modeling.gated_mlp import find_gated_mlps
from suite.registry import METHODS, method_class
from tests.conftest import D_FF, D_MODEL
from tests.fitting.conftest import loaded
from tests.fitting.test_formulas import EPS, silu, weights

RANK = 6
PREDICTED = [name for name in METHODS if method_class(name).predicted]
GATED = PredictorOptions(predictor="gated", rank=RANK, rounds=1)


def gated(model, name, text, sparsity=0.6, **changes):
    options = dataclasses.replace(GATED, **changes)
    return fit_predictors(model, [Wanted(get_method(name, sparsity=sparsity))], text, options)[0]


def seen_by_layers(model, windows):
    """Inputs of both layers' MLPs and of their blocks behind the first norm, (n_tokens, d_model) each, fp64."""
    found, handles = {"mlp": [[], []], "block": [[], []]}, []
    for layer, block in enumerate(model.model.layers):
        keep = lambda _, args, layer=layer: found["mlp"][layer].append(args[0][0])  # noqa: E731
        handles.append(block.mlp.register_forward_pre_hook(keep))
        keep = lambda _, args, out, layer=layer: found["block"][layer].append(out[0])  # noqa: E731
        handles.append(block.input_layernorm.register_forward_hook(keep))
    with torch.no_grad():
        for window in windows:
            model(torch.tensor([window]))
    for handle in handles:
        handle.remove()
    return {name: [torch.cat(rows).double().numpy() for rows in layers] for name, layers in found.items()}


def regression(target, h, rank):
    """Reduced-rank regression of ``target`` (n, d) on h: M = E[t h^T] C^-1, C = L L^T with the ridge, svd(M L)."""
    gram = h.T @ h / len(h)
    root = np.linalg.cholesky(gram + 1e-4 * np.trace(gram) / len(gram) * np.eye(len(gram)))
    full = target.T @ h / len(h) @ np.linalg.inv(root).T
    left, values, right = np.linalg.svd(full, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank] @ np.linalg.inv(root)


def expected(name, mlp, x, h, seen, *, exact_input):
    """Square of what is expected of the score, from fp64 arrays: x, h of the calibration, ``seen`` of new tokens."""
    gate, up, down = weights(mlp)
    low = {}
    for part, weight in (("gate", gate), ("up", up)):
        if exact_input:  # svd(W L)
            gram = x.T @ x / len(x)
            root = np.linalg.cholesky(gram + 1e-4 * np.trace(gram) / len(gram) * np.eye(len(gram)))
            left, values, right = np.linalg.svd(weight @ root, full_matrices=False)
            low[part] = (left[:, :RANK] * values[:RANK]) @ right[:RANK] @ np.linalg.inv(root)
        else:
            low[part] = regression(x @ weight.T, h, RANK)
    g, u, g_low, u_low = x @ gate.T, x @ up.T, h @ low["gate"].T, h @ low["up"].T
    if name == "dejavu-abs":
        return (seen @ low["gate"].T) ** 2 + ((g - g_low) ** 2).mean(0)
    c, e = ((silu(g) - silu(g_low)) ** 2).mean(0), ((u - u_low) ** 2).mean(0)
    square = (silu(seen @ low["gate"].T) ** 2 + c) * ((seen @ low["up"].T) ** 2 + e)
    return square * (down**2).sum(0) if name == "s-countdown" else square


@pytest.mark.parametrize("read", ["mlp", "block"])
@pytest.mark.parametrize("name", PREDICTED)
def test_logits_are_the_root_of_what_is_expected_of_the_score(tmp_path, text, name, read):
    model = loaded(tmp_path)
    made = load_fit(save_fit(gated(model, name, text, predictor_input=read), tmp_path))
    inputs = seen_by_layers(model.model, make_predictor_windows(text, model.tokenizer, 0).train)
    new = torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(2))
    for mlp, x, h in zip(find_gated_mlps(model.model), inputs["mlp"], inputs[read], strict=True):
        right = np.sqrt(expected(name, mlp, x, h, new.double().numpy(), exact_input=read == "mlp"))
        found = made.logits(mlp.layer, new).double().numpy()
        size = np.sqrt((right**2).mean())
        # products of d_model terms in fp32, twice, through inverses whose condition the ridge of 1e-4 bounds
        assert np.abs(found - right).max() < 100 * D_MODEL * EPS * size
        assert right.std() > 0.1 * size


@pytest.mark.parametrize("read", ["mlp", "block"])
def test_masks_by_what_it_reads_in_every_layer(tmp_path, text, read):
    model, method = loaded(tmp_path), get_method("d-countdown", sparsity=0.6)
    made, ids = gated(model, "d-countdown", text, predictor_input=read), torch.arange(3, 40)[None]
    assert made.predictor_input == read
    read_now, handles = {}, []
    for mlp, block in zip(find_gated_mlps(model.model), model.model.model.layers, strict=True):
        place = block.input_layernorm if read == "block" else block.post_attention_layernorm
        keep = lambda _, args, out, layer=mlp.layer: read_now.update({layer: out[0]})  # noqa: E731
        handles.append(place.register_forward_hook(keep))

        def drop(_module, args, layer=mlp.layer):
            kept = made.logits(layer, read_now[layer]) >= made.thresholds[layer]
            return (args[0] * kept,)

        handles.append(block.mlp.down_proj.register_forward_pre_hook(drop))
    with torch.no_grad():
        by_hand = model.model(ids).logits
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        dense = model.model(ids).logits
        with attach(model.model, method, made) as attached:
            ours = model.model(ids).logits
        after = model.model(ids).logits
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-4)
    assert torch.equal(after, dense)
    assert 0.4 < attached.realised < 0.8
    assert made.meta["held_out_sparsity"] == pytest.approx([0.6] * 2, abs=0.05)


def test_the_second_round_sees_what_the_layers_before_leave(tmp_path, text):
    model = loaded(tmp_path)
    first, second = (gated(model, "d-countdown", text, rounds=rounds) for rounds in (1, 2))
    assert torch.equal(first.residual[0], second.residual[0])  # before layer 0 nothing is sparse
    assert not torch.allclose(first.residual[1], second.residual[1], rtol=1e-3)
    windows = make_predictor_windows(text, model.tokenizer, 0).train
    with attach(model.model, get_method("d-countdown", sparsity=0.6), first):
        inputs = seen_by_layers(model.model, windows)["mlp"][1]
    mlp = find_gated_mlps(model.model)[1]
    new = torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(2))
    right = np.sqrt(expected("d-countdown", mlp, inputs, inputs, new.double().numpy(), exact_input=True))
    found = second.logits(1, new).double().numpy()
    assert np.abs(found - right).max() < 1e-3 * np.sqrt((right**2).mean())


def test_bytes_count_both_ranks_and_the_residuals(tmp_path, text):
    model = loaded(tmp_path, dtype=torch.bfloat16)
    for name, n in (("d-countdown", 2), ("dejavu-abs", 1)):
        made = gated(model, name, text)
        held = sum(one.nbytes for part in (made.v, made.u, made.residual) for one in part)
        assert made.bytes_share == pytest.approx(held / (2 * 3 * D_MODEL * D_FF * 2))
        assert made.bytes_share == pytest.approx(gated_share(RANK, n, D_MODEL, D_FF, "bfloat16"))
        assert made.v[0].dtype == made.u[0].dtype == torch.bfloat16
        assert made.residual[0].dtype == torch.float32
    assert gated_share(256, 2, 4096, 14336, "bfloat16") == pytest.approx(
        2 * 256 * (4096 + 14336) / (3 * 4096 * 14336) + 8 / (3 * 4096 * 2)
    )


@pytest.mark.parametrize(("read", "n_inputs"), [("mlp", 1), ("block", 2)])
def test_the_activation_budget_counts_the_inputs_and_no_scores(tmp_path, text, monkeypatch, read, n_inputs):
    model, passes = loaded(tmp_path), []

    def counted(model, mlps, *rest, **more):
        passes.append(len(mlps))
        return mlp_inputs(model, mlps, *rest, **more)

    monkeypatch.setattr("suite.fitting.predictor.mlp_inputs", counted)
    options = dataclasses.replace(GATED, rounds=1, predictor_input=read)
    wanted = [Wanted(get_method("d-countdown", sparsity=0.5))]
    n_tokens = sum(map(len, make_predictor_windows(text, model.tokenizer, 0).train))
    layer = 4 * n_inputs * D_MODEL * n_tokens / 2**30
    fit_predictors(model, wanted, text, options, activation_budget_gib=1.99 * layer)
    assert passes[: 2 * n_inputs] == [1] * (2 * n_inputs)
    passes.clear()
    fit_predictors(model, wanted, text, options, activation_budget_gib=2.01 * layer)
    assert passes[:n_inputs] == [2] * n_inputs


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("d_model", "d_ff"), [(576, 1536), (640, 2048), (1536, 8960), (4096, 14336)])
def test_the_default_rank_has_the_bytes_of_the_default_low_rank_one_and_no_more(d_model, d_ff, n):
    rank = dataclasses.replace(GATED, rank=None).rank_for(d_model, n)
    most = low_rank_share(PredictorOptions().rank_for(d_model), d_model, d_ff)
    for dtype in ("float32", "bfloat16", "float16"):
        assert gated_share(rank, n, d_model, d_ff, dtype) <= most
    assert gated_share(rank + 1, n, d_model, d_ff, "bfloat16") > most
    assert dataclasses.replace(GATED, rank=None).rank_for(4, n) == 1


def test_keys_depend_on_what_counts_and_only_on_that():
    rest = ("weights", "text", 4096, 0, "float32")
    method = get_method("d-countdown", sparsity=0.5)
    one = training_key(method, GATED, *rest)
    for changes in ({"epochs": 9}, {"loss": "bce"}, {"learning_rate": 0.5}):
        assert training_key(method, dataclasses.replace(GATED, **changes), *rest) == one
    others = [{"rank": 7}, {"rounds": 2}, {"predictor_input": "block"}]
    keys = {training_key(method, dataclasses.replace(GATED, **changes), *rest) for changes in others}
    assert len(keys | {one}) == 4
    assert GATED.rank_for(64) == RANK
    assert "predictor_input" not in PredictorOptions().fields()  # keys of earlier fits stay


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("dejavu", {}, "dejavu has no gated predictor"),
        ("d-countdown", {"rank": 33}, "rank 33 of a predictor is above the model's d_model 32"),
        ("m-countdown", {}, "m-countdown has no predictor to fit"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(tmp_path, text, name, changes, match):
    with pytest.raises(InputError, match=match) as refused:
        gated(loaded(tmp_path), name, text, **changes)
    assert "\n" not in str(refused.value)


def test_other_bad_input(tmp_path, text, monkeypatch):
    model = loaded(tmp_path)
    monkeypatch.setattr("suite.fitting.predictor._LEAST_TOKENS", 1)
    with pytest.raises(InputError, match="rank 32 of a gated predictor is more than the 30 tokens"):
        gated(model, "d-countdown", dataclasses.replace(text, max_tokens=40), rank=32)
    with pytest.raises(InputError, match="estimator 'zero' of a gated predictor"):
        fit_predictors(model, [Wanted(get_method("d-countdown", sparsity=0.5), "zero")], text, GATED)
    with pytest.raises(InputError, match="predictor_input block of a low-rank predictor: only a gated one reads it"):
        PredictorOptions(predictor_input="block")
    with pytest.raises(InputError, match="predictor_input 'blok'"):
        PredictorOptions(predictor="gated", predictor_input="blok")
    made = gated(model, "d-countdown", text, predictor_input="block")
    with attach(model.model, get_method("d-countdown", sparsity=0.6), made, backend="numba"):
        pass  # the kernels take it, and are held against the masked computation


@pytest.mark.parametrize("exact", ["up", "gate"])
def test_md_countdown_may_read_the_block(tmp_path, text, exact):
    model = loaded(tmp_path)
    method = get_method("md-countdown", sparsity=0.6, rank=RANK, exact=exact, predictor_input="block")
    made = fit(model, method, text)
    windows = make_windows(text, model.tokenizer, 0).fit
    inputs = seen_by_layers(model.model, windows)
    known = made.calibrated(torch.device("cpu"))
    new_x, new_h = (torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(n)) for n in (2, 3))
    for mlp, x, h in zip(find_gated_mlps(model.model), inputs["mlp"], inputs["block"], strict=True):
        gate, up, _ = weights(mlp)
        seen_x, seen_h = new_x.double().numpy(), new_h.double().numpy()
        if exact == "up":
            low = regression(x @ gate.T, h, RANK)
            c = ((silu(x @ gate.T) - silu(h @ low.T)) ** 2).mean(0)
            right = np.abs(seen_x @ up.T) * np.sqrt(silu(seen_h @ low.T) ** 2 + c)
        else:
            low = regression(x @ up.T, h, RANK)
            e = ((x @ up.T - h @ low.T) ** 2).mean(0)
            right = np.abs(silu(seen_x @ gate.T)) * np.sqrt((seen_h @ low.T) ** 2 + e)
        made_of = dataclasses.replace(mlp.activations(new_x, block=new_h), calibrated=known[mlp.layer])
        found = method.score(made_of).detach().double().numpy()
        assert np.abs(found - right).max() < 100 * D_MODEL * EPS * np.sqrt((right**2).mean())
    with attach(model.model, method, made) as attached, torch.no_grad():
        model.model(torch.tensor([windows[0]]))
    assert attached.realised == pytest.approx(0.6, abs=0.1)


def test_rounds_of_a_threshold_fit(tmp_path, text):
    model = loaded(tmp_path)
    one, two = (
        fit(model, get_method("md-countdown", sparsity=0.6, rank=RANK, fit_rounds=rounds), text) for rounds in (1, 2)
    )
    assert one.key != two.key
    residuals = [made.extras["factor.gate.residual"] for made in (one, two)]
    assert torch.equal(residuals[0][0], residuals[1][0])
    assert not torch.allclose(residuals[0][1], residuals[1][1], rtol=1e-3)
    assert two.meta["held_out_sparsity"] == pytest.approx([0.6] * 2, abs=0.03)


def test_a_block_without_the_norm_is_refused(text, tmp_path):
    model = loaded(tmp_path)
    method = get_method("md-countdown", sparsity=0.6, rank=RANK, predictor_input="block")
    block = model.model.model.layers[0]
    norm = block._modules.pop("input_layernorm")
    block.input_norm = norm
    try:
        with pytest.raises(InputError, match="has no input_layernorm: use predictor_input mlp"):
            fit(model, method, text)
    finally:
        del block.input_norm
        block.input_layernorm = norm
