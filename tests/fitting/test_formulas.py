"""Scores of methods that ask for a fit, against numpy in fp64 from the inputs of the layers and the weights alone."""

import dataclasses

import numpy as np
import pytest
import torch

from suite import fit, get_method
from suite.fitting.moments import low_rank
from suite.fitting.windows import make_windows
from suite.modeling.attach import attach
from suite.modeling.gated_mlp import find_gated_mlps
from suite.registry import METHODS
from tests.conftest import D_FF, D_MODEL
from tests.fitting.conftest import loaded
from tests.fitting.test_moments import dense_inputs

RANK = 5
PARAMETERS = {"md-countdown": [{"rank": RANK, "exact": "up"}, {"rank": RANK, "exact": "gate"}]}
CALIBRATED = [name for name in METHODS if get_method(name).needs_calibration]
SETTINGS = [(name, given) for name in CALIBRATED for given in PARAMETERS.get(name, [{}])]
EPS = 2.0**-23


def silu(g):
    return g / (1 + np.exp(-g))


def whitened(weight, x, rank):
    """The best approximation of a rank on the inputs of second moments C + ridge = L L^T: svd(W L), then L^-1."""
    gram = x.T @ x / len(x)
    root = np.linalg.cholesky(gram + 1e-4 * np.trace(gram) / len(gram) * np.eye(len(gram)))
    left, values, right = np.linalg.svd(weight @ root, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank] @ np.linalg.inv(root)


def expected(name, given, gate, up, x, seen):
    """Square of the score: what is expected of v^2, for inputs ``seen`` with calibration inputs ``x``."""
    a, u = silu(x @ gate.T), x @ up.T
    a_seen, u_seen = silu(seen @ gate.T), seen @ up.T
    if name == "chess":
        return a_seen**2 * (u**2).mean(0)
    if name == "m-countdown-cw":
        return u_seen**2 * (a**2).mean(0)
    if given["exact"] == "gate":
        low = whitened(up, x, RANK)
        return a_seen**2 * ((seen @ low.T) ** 2 + ((u - x @ low.T) ** 2).mean(0))
    low = whitened(gate, x, RANK)
    return u_seen**2 * (silu(seen @ low.T) ** 2 + ((a - silu(x @ low.T)) ** 2).mean(0))


def weights(mlp):
    return [weight.detach().double().numpy() for weight in mlp.weights()]


@pytest.mark.parametrize(("name", "given"), SETTINGS)
def test_scores_are_the_root_of_what_is_expected_of_v2(tmp_path, text, name, given):
    model = loaded(tmp_path)
    method = get_method(name, sparsity=0.5, **given)
    made = fit(model, method, text)
    seen = torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(2))
    inputs = dense_inputs(model.model, make_windows(text, model.tokenizer, 0).fit)
    layers = made.calibrated(torch.device("cpu"))
    for mlp, x, known in zip(find_gated_mlps(model.model), inputs, layers, strict=True):
        gate, up, _ = weights(mlp)
        found = method.score(dataclasses.replace(mlp.activations(seen), calibrated=known)).detach().double().numpy()
        right = np.sqrt(expected(name, given, gate, up, x.detach().double().numpy(), seen.double().numpy()))
        # Every product of d_model terms in fp32 is off by d_model eps of its terms' sizes, a factor's by as much again;
        # the inputs of the second layer, made by fp32 layers in another batch, by a little more.
        size = np.sqrt((right**2).mean())
        assert np.abs(found - right).max() < 20 * D_MODEL * EPS * size
        assert right.std() > 0.1 * size


@pytest.mark.parametrize(("name", "given"), SETTINGS)
def test_ideal_keeps_exactly_k_by_the_methods_own_score(tmp_path, text, name, given):
    model, method = loaded(tmp_path), get_method(name, sparsity=0.75, **given)
    made = fit(model, method, text)
    mlp, kept = find_gated_mlps(model.model)[0], []
    handle = mlp.module.down_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0][0] != 0))
    with attach(model.model, method, made, mode="ideal") as attached, torch.no_grad():
        inputs = []
        before = mlp.module.up_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].clone()))
        model.model(torch.arange(3, 60)[None])
        before.remove()
    handle.remove()
    known = made.calibrated(torch.device("cpu"))[0]
    score = method.score(dataclasses.replace(mlp.activations(inputs[-1]), calibrated=known))
    best = score.argsort(-1, descending=True)[:, : D_FF // 4]
    assert torch.equal(kept[-1].nonzero()[:, 1].view(-1, D_FF // 4), best.sort().values)
    assert attached.realised == 0.75


@pytest.mark.parametrize("name", CALIBRATED)
def test_the_threshold_realises_the_target_on_held_out_text(tmp_path, text, name):
    made = fit(loaded(tmp_path), get_method(name, sparsity=0.6, **PARAMETERS.get(name, [{}])[0]), text)
    assert made.meta["held_out_sparsity"] == pytest.approx([0.6] * 2, abs=0.03)  # 1024 held-out tokens


@pytest.mark.parametrize("dead", [0, 1, D_MODEL - 3, D_MODEL])
def test_dead_inputs_do_not_fail(dead):
    """A singular C: the ridge is in the formula; where all inputs are 0 any factor will do, but a finite one."""
    generator = torch.Generator().manual_seed(7)
    weight, x = (torch.randn(n, D_MODEL, generator=generator) for n in (D_FF, 400))
    x[:, D_MODEL - dead :] = 0
    factor = low_rank(weight, x.T @ x / 400, RANK)
    for part in (factor.v, factor.u):
        assert bool(part.half().isfinite().all())
    if dead < D_MODEL:
        product = (x.double() @ weight.double().T).numpy()
        best = np.linalg.svd(product, compute_uv=False)[RANK:]
        missed = np.square((x @ factor.v @ factor.u.T).double().numpy() - product).sum()
        assert missed <= (best**2).sum() * 1.001 + (product**2).sum() * EPS


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_auto_takes_the_projection_that_diverges_least_and_says_so(tmp_path, text, architecture):
    model = loaded(tmp_path, architecture)
    auto = get_method("md-countdown", sparsity=0.6, rank=RANK, exact="auto")
    made = fit(model, auto, text)
    tried = {one["exact"]: one["kl_dense"] for one in made.meta["tried"]}
    assert list(tried) == ["up", "gate"]
    assert made.chosen == {"exact": min(tried, key=tried.__getitem__)}
    assert made.meta["parameters"]["exact"] == "auto"
    windows = make_windows(text, model.tokenizer, 0).fit
    passes = []
    counter = model.model.register_forward_hook(lambda *_: passes.append(1))
    for exact in tried:
        fit(model, dataclasses.replace(auto, exact=exact), text)
    n_alone = len(passes)
    passes.clear()
    fit(model, auto, text)
    counter.remove()
    n_batches = -(-len(windows) // 2)  # 512 tokens a batch
    # one dense pass for both: over the moments, over what the factors miss (each of one batch), over the divergences
    assert len(passes) == n_alone - 2 + 3 * n_batches
    for exact, said in tried.items():
        one = dataclasses.replace(auto, exact=exact)
        alone = fit(model, one, text)
        assert alone.key != made.key
        if exact == made.chosen["exact"]:
            assert torch.equal(alone.thresholds, made.thresholds)
            assert alone.extras.keys() == made.extras.keys()
        total = 0.0
        for window in windows:
            ids = torch.tensor([window])
            with torch.no_grad():
                dense = model.model(ids).logits.double().log_softmax(-1)
                with attach(model.model, one, alone):
                    sparse = model.model(ids).logits.double().log_softmax(-1)
            total += (dense.exp() * (dense - sparse)).sum().item()
        assert said == pytest.approx(total / sum(map(len, windows)), rel=1e-3)
    with attach(model.model, auto, made) as ours, torch.inference_mode():
        logits = model.model(torch.tensor([windows[0]])).logits
    settled = dataclasses.replace(auto, **made.chosen)
    with attach(model.model, settled, made) as other, torch.inference_mode():
        assert torch.equal(model.model(torch.tensor([windows[0]])).logits, logits)
    assert ours.realised == other.realised
