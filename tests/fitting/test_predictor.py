"""Predictors trained on tiny models: gradients, targets met, resume, determinism, budgets, bad input."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from suite import attach, fit, get_method
from suite.errors import CellError, InputError
from suite.fitting import predictor as module
from suite.fitting import training
from suite.fitting.artifacts import load_fit, save_fit
from suite.fitting.calibration import Calibration
from suite.fitting.keys import predictor_key, training_key
from suite.fitting.linear import LowRank, Ternary, regression
from suite.fitting.options import LOSSES, PredictorOptions
from suite.fitting.predictor import Wanted, discard_partial, fit_predictors
from suite.fitting.quality import layer_quality
from suite.fitting.stream import method_scores, mlp_inputs
from suite.fitting.training import Batch, Job, kth_scores, make_job, train
from suite.methods.base import kept_count, select_top_k
from suite.modeling.gated_mlp import find_gated_mlps
from suite.modeling.loading import weights_fingerprint
from tests.conftest import D_FF, D_MODEL, tiny_model
from tests.fitting.conftest import loaded

QUICK = PredictorOptions(epochs=2, batch_tokens=256, rank=8)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "random.jsonl"
    rng = np.random.default_rng(0)
    lines = ["".join(chr(c) for c in rng.integers(48, 122, 300)) for _ in range(120)]
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return Calibration(f"file:{path}", max_tokens=8192)


def wanted(*names, sparsity=0.7, estimator="calibrated"):
    return [Wanted(get_method(name, sparsity=sparsity), estimator) for name in names]


def random_job(loss="mass", n_layers=2, n_tokens=300, d_model=12, d_ff=20, signed=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_layers, n_tokens, d_model, generator=generator)
    score = torch.randn(n_layers, n_tokens, d_ff, generator=generator)
    score = score if signed else score.abs()
    (kth,) = kth_scores(score, [0.7])
    return x, make_job(PredictorOptions(loss=loss, rank=5, start="random"), range(n_layers), x, score, kth, 0)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_by_hand_are_those_of_autograd(loss, signed):
    x, job = random_job(loss, signed=signed)
    options = PredictorOptions(loss=loss, pos_weight=1.5)
    batch = job.part(torch.arange(64))
    gradient, value = training._loss(job.stack.forward(x[:, :64]), batch, options, wanted=True)
    job.stack.backward(x[:, :64], gradient)
    ours = [parameter.grad.clone() for parameter in job.stack.parameters]
    for parameter in job.stack.parameters:
        parameter.grad = None
        parameter.requires_grad_()
    _, again = training._loss(job.stack.forward(x[:, :64]), batch, options, wanted=True)
    torch.testing.assert_close(again, value)
    again.sum().backward()
    for mine, parameter in zip(ours, job.stack.parameters, strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-7)


def test_ternary_gradient_passes_straight_through_the_rounding():
    x, _ = random_job()
    stack = Ternary.given(torch.randn(2, 20, 12, generator=torch.Generator().manual_seed(1)))
    upstream = torch.randn(2, 300, 20, generator=torch.Generator().manual_seed(2))
    stack.forward(x)
    stack.backward(x, upstream)
    rounded = stack.matrices(0, torch.float32)
    weight = (rounded["u"] * rounded["scale"]).requires_grad_()
    (x[0] @ weight.T * upstream[0]).sum().backward()
    torch.testing.assert_close(stack.parameters[0].grad[0], weight.grad, rtol=1e-4, atol=1e-4)
    assert set(rounded["u"].unique().tolist()) == {-1, 0, 1}
    x0 = x[:, :7]
    torch.testing.assert_close(stack.forward(x0)[0], x0[0] @ (rounded["u"] * rounded["scale"]).T)


def test_labels_are_the_ideal_rule_and_mass_is_one_at_the_kth_score():
    score = torch.rand(2, 50, D_FF, generator=torch.Generator().manual_seed(3))
    for sparsity, kth in zip((0.5, 0.9), kth_scores(score, [0.5, 0.9]), strict=True):
        batch = Batch(score, kth, signed=False)
        ideal = select_top_k(score.flatten(0, 1), kept_count(D_FF, sparsity))
        assert torch.equal(batch.kept().flatten(0, 1), ideal)
        assert torch.equal(batch.mass() >= 1, batch.kept())
        by_deviation = Batch(score - 0.5, kth - 0.5, signed=True)
        assert torch.equal(by_deviation.mass() >= 1, batch.kept())
        for loss in LOSSES[1:4]:
            assert (batch.weight(loss).mean(-1) - 1).abs().max() < 1e-5


def test_regression_is_the_best_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 500, 6, generator=generator) * torch.tensor([1.0, 5, 2, 1, 1, 3])
    truth = torch.randn(6, 2, generator=generator) @ torch.randn(2, 9, generator=generator)
    v, u = regression(x, lambda part: x[:, part] @ truth, 2)
    assert (v.shape, u.shape) == ((1, 6, 2), (1, 9, 2))
    # the ridge, a thousandth of the mean channel power of 7, shrinks a channel of power 1 by .007
    torch.testing.assert_close(v[0] @ u[0].T, truth, rtol=0, atol=0.01 * float(truth.abs().max()))
    noisy = x @ torch.randn(6, 9, generator=generator)
    v, u = regression(x, lambda part: noisy[:, part], 3)
    ours = (x @ v @ u.mT - noisy).norm()
    values = torch.linalg.svdvals(noisy[0])
    assert ours <= values[3:].norm() * 1.01  # Eckart and Young: what the singular vectors that are left out hold


@pytest.mark.parametrize("options", [{}, {"start": "random"}, {"predictor": "ternary", "rank": None}])
def test_training_lowers_the_loss_and_finds_more_mass_than_chance(tmp_path, text, options):
    model = loaded(tmp_path)
    options = dataclasses.replace(QUICK, epochs=6, rounds=1, learning_rate=0.01, **options)
    (made,) = fit_predictors(model, wanted("d-countdown"), text, options)
    for layer in made.meta["layers"]:
        assert 0.3 < layer["mass_kept"] < layer["mass_kept_ideal"] < 1
        assert layer["overlap_at_k"] > 0.35  # .3 by chance
        assert 0 < layer["loss"] < 10


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("name", ["d-countdown", "dejavu"])
def test_calibrated_realises_its_target_on_documents_it_has_not_seen(tmp_path, text, architecture, name):
    model = loaded(tmp_path, architecture)
    (made,) = fit_predictors(model, wanted(name), dataclasses.replace(text, max_tokens=16384), QUICK)
    assert made.meta["held_out_sparsity_mean"] == pytest.approx(0.7, abs=0.01)
    assert len(made.meta["layers"]) == 2
    assert all(0 < layer["sparsity_spread"] < 0.5 for layer in made.meta["layers"])


def test_zero_keeps_logits_above_zero_and_shares_the_training(tmp_path, text):
    pair = wanted("d-countdown") + wanted("d-countdown", estimator="zero")
    calibrated, zero = fit_predictors(loaded(tmp_path), pair, text, dataclasses.replace(QUICK, loss="bce"))
    assert all(torch.equal(a, b) for a, b in zip(calibrated.u, zero.u, strict=True))
    assert calibrated.key != zero.key
    assert 0 < float(zero.thresholds[0]) < 1e-37
    assert not torch.equal(calibrated.thresholds, zero.thresholds)


def test_sparsity_zero_keeps_everything(tmp_path, text, ids):
    model = loaded(tmp_path)
    (made,) = fit_predictors(model, wanted("d-countdown", sparsity=0.0), text, QUICK)
    with torch.inference_mode():
        dense = model.model(ids).logits
        with attach(model.model, get_method("d-countdown"), made) as attached:
            assert torch.equal(model.model(ids).logits, dense)
    assert attached.realised == 0


def test_methods_and_sparsities_that_share_a_pass_come_out_as_alone(tmp_path, text):
    model = loaded(tmp_path)
    several = wanted("d-countdown") + wanted("dejavu-abs") + wanted("d-countdown", sparsity=0.5)
    together = fit_predictors(model, several, text, QUICK)
    for want, made in zip(several, together, strict=True):
        (alone,) = fit_predictors(model, [want], text, QUICK)
        assert made.sha256 == alone.sha256
        assert (made.method, made.sparsity) == (want.method.name, want.method.sparsity)
        key = training_key(
            want.method, QUICK, weights_fingerprint(model.ref), text.fingerprint(), text.max_tokens, 0, "float32"
        )
        assert made.key == predictor_key(key, "calibrated")
    assert len({made.key for made in together}) == 3


def test_same_seed_same_fit_other_seed_other_fit(tmp_path, text):
    model = loaded(tmp_path)
    first, again = (fit_predictors(model, wanted("dejavu"), text, QUICK)[0] for _ in range(2))
    assert first.sha256 == again.sha256
    (other,) = fit_predictors(model, wanted("dejavu"), text, QUICK, seed=1)
    assert other.sha256 != first.sha256
    assert other.key != first.key


def test_a_small_budget_takes_more_passes_and_gives_the_same(tmp_path, text, monkeypatch):
    model = loaded(tmp_path)
    passes = []

    def counted(*arguments):
        passes.append(len(arguments[1]))
        return mlp_inputs(*arguments)

    monkeypatch.setattr(module, "mlp_inputs", counted)
    options = dataclasses.replace(QUICK, rounds=1)
    (roomy,) = fit_predictors(model, wanted("d-countdown"), text, options)
    assert passes == [2, 2]  # to train on and to check on
    passes.clear()
    layer = 4 * (D_MODEL + D_FF + 1) * roomy.meta["n_tokens"] / 2**30
    (tight,) = fit_predictors(model, wanted("d-countdown"), text, options, activation_budget_gib=1.5 * layer)
    assert passes[:2] == [1, 1]
    assert tight.sha256 == roomy.sha256
    with pytest.raises(InputError, match="give a larger --activation-budget-gib, fewer tokens"):
        fit_predictors(model, wanted("d-countdown"), text, options, activation_budget_gib=0.5 * layer)


def test_inputs_are_those_of_the_model_without_padding(tmp_path):
    model = tiny_model("llama")
    mlps = find_gated_mlps(model)
    windows = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14]]  # the padded one is not the last
    found = mlp_inputs(model, mlps, windows)
    assert found.shape == (2, 10, D_MODEL)
    seen = []
    handle = mlps[1].module.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    with torch.inference_mode():
        for window in windows:
            model(input_ids=torch.tensor([window]))
    handle.remove()
    torch.testing.assert_close(found[1], torch.cat(seen), rtol=0, atol=1e-5)
    only = mlp_inputs(model, mlps[:1], windows)
    assert torch.equal(only[0], found[0])
    (score,) = method_scores(mlps, [get_method("dejavu")], found)
    torch.testing.assert_close(score[0], mlps[0].gate_up(found[0])[0], rtol=0, atol=1e-5)


def test_quality_by_hand(tmp_path, text):
    model = loaded(tmp_path)
    method = get_method("d-countdown", sparsity=0.7)
    (made,) = fit_predictors(model, [Wanted(method)], text, QUICK)
    mlps = find_gated_mlps(model.model)
    x = mlp_inputs(model.model, mlps, [list(range(3, 40))])
    found = layer_quality(made, method, mlps, x)
    for mlp, own, values in zip(mlps, x, found, strict=True):
        gate, up = mlp.gate_up(own)
        v = (mlp.act(gate) * up).detach().double()
        logit = made.logits(mlp.layer, own)
        k = kept_count(D_FF, 0.7)
        kept = logit >= made.thresholds[mlp.layer]
        ideal = torch.zeros_like(kept).scatter_(1, v.abs().topk(k).indices, True)
        best = torch.zeros_like(kept).scatter_(1, logit.topk(k).indices, True)
        by_hand = {
            "recall": ((kept & ideal).sum(1) / k).mean(),
            "overlap_at_k": ((best & ideal).sum(1) / k).mean(),
            "mass_kept": ((v**2 * kept).sum(1) / (v**2).sum(1)).mean(),
            "mass_kept_ideal": ((v**2 * ideal).sum(1) / (v**2).sum(1)).mean(),
            "sparsity_realized": 1 - kept.double().mean(),
        }
        for name, value in by_hand.items():
            assert values[name] == pytest.approx(float(value), abs=1e-6), name


def test_nan_loss_names_the_layer_and_keeps_finished_layers(tmp_path, text, monkeypatch):
    model = loaded(tmp_path)
    real = module.train

    def broken(x, jobs, layers, *rest):
        if 1 in layers:
            x = x.clone()
            x[:, 3] = torch.nan
        real(x, jobs, layers, *rest)

    monkeypatch.setattr(module, "train", broken)
    with pytest.raises(CellError, match="the loss of the predictor of layer 1 is NaN"):
        fit_predictors(model, wanted("d-countdown"), text, QUICK, folder=tmp_path / "fits")
    (partial,) = (tmp_path / "fits").iterdir()
    assert [path.name for path in partial.iterdir()] == ["round-1-layer-000.safetensors"]


def test_nan_activations_are_named(tmp_path, text):
    model = loaded(tmp_path)
    weight = model.model.model.layers[0].mlp.up_proj.weight
    before = weight.data[3].clone()
    weight.data[3] = torch.nan
    try:
        with pytest.raises(CellError, match="inputs of layer 1 are NaN"):
            fit_predictors(model, wanted("d-countdown"), text, QUICK)
    finally:
        weight.data[3] = before


def test_out_of_gpu_memory_suggests_a_smaller_budget(tmp_path, text, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "train", full)
    with pytest.raises(CellError, match="give a smaller --activation-budget-gib, such as 1"):
        fit_predictors(loaded(tmp_path), wanted("d-countdown"), text, QUICK, activation_budget_gib=2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank 0 of a predictor"),
        ({"predictor": "ternery"}, "did you mean 'ternary'"),
        ({"loss": "mse"}, "unknown loss 'mse'"),
        ({"epochs": -1}, "epochs -1"),
        ({"epochs": 0, "start": "random"}, "epochs 0"),
        ({"predictor": "ternary", "rank": 4}, "it has none"),
        ({"learning_rate": math.inf}, "learning_rate inf"),
        ({"pos_weight": 0}, "pos_weight 0"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(InputError, match=match):
        PredictorOptions(**options)


def test_what_cannot_be_fitted(tmp_path, text):
    model = loaded(tmp_path)
    with pytest.raises(InputError, match="rank 33 of a predictor is above the model's d_model 32"):
        fit_predictors(model, wanted("d-countdown"), text, PredictorOptions(rank=33))
    with pytest.raises(InputError, match="method cats has no predictor"):
        fit_predictors(model, wanted("cats"), text, QUICK)
    with pytest.raises(InputError, match="tokens to train a predictor on; give at least 64"):
        fit_predictors(model, wanted("dejavu"), dataclasses.replace(text, max_tokens=40), QUICK)
    with pytest.raises(InputError, match="unknown estimator 'zeroo'; did you mean 'zero'"):
        fit_predictors(model, wanted("dejavu", estimator="zeroo"), text, QUICK)


def test_public_fit_makes_what_the_method_needs(tmp_path, text, ids):
    model, method = loaded(tmp_path), get_method("dejavu", sparsity=0.7)
    made = fit(model, method, text, options=QUICK)
    assert made.sha256 == fit_predictors(model, wanted("dejavu"), text, QUICK)[0].sha256
    with torch.inference_mode(), attach(model.model, method, made) as attached:
        model.model(ids)
    assert 0.4 < attached.realised < 0.95
    assert fit(model, get_method("cats", sparsity=0.7), text).method == "cats"
    with pytest.raises(InputError, match="no threshold to fit"):
        fit(model, get_method("random", sparsity=0.7), text)


KILLED = """
import sys, time
from pathlib import Path
from suite.fitting import predictor as module
from suite.fitting.calibration import Calibration
from suite.fitting.predictor import fit_predictors
from tests.fitting.test_predictor import QUICK, wanted
from tests.fitting.conftest import loaded
folder, text = Path(sys.argv[1]), sys.argv[2]
real = module.train
def train(x, jobs, layers, *rest):
    if 1 in layers:
        print("at layer 1", flush=True)
        time.sleep(60)
    real(x, jobs, layers, *rest)
module.train = train
fit_predictors(loaded(folder), wanted("d-countdown"), Calibration(text, 8192), QUICK, folder=folder / "fits")
"""


def test_a_killed_fit_goes_on_with_its_finished_layers(tmp_path, text, monkeypatch):
    whole = fit_predictors(loaded(tmp_path), wanted("d-countdown"), text, QUICK)[0]
    command = [sys.executable, "-c", KILLED, str(tmp_path), text.source]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout.readline() == "at layer 1\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    trained = []
    real = module.train

    def watched(x, jobs, layers, *rest):
        trained.extend(layers)
        real(x, jobs, layers, *rest)

    monkeypatch.setattr(module, "train", watched)
    resumed = fit_predictors(loaded(tmp_path), wanted("d-countdown"), text, QUICK, folder=tmp_path / "fits")
    assert trained == [1, 0, 1]  # the rest of the first round, then the second
    assert resumed[0].sha256 == whole.sha256
    path = save_fit(resumed[0], tmp_path / "fits")
    discard_partial(resumed, tmp_path / "fits")
    assert list((tmp_path / "fits").iterdir()) == [path]
    assert load_fit(path).cost["peak_memory_mib"] > 0


def test_progress_tells_the_time_left(tmp_path, text, monkeypatch):
    lines = []
    monkeypatch.setattr(module, "_QUIET_S", 0.0)
    fit_predictors(loaded(tmp_path), wanted("dejavu"), text, QUICK, progress=lines.append)
    assert lines[0].startswith("fitting low-rank predictors of dejavu 0.7 on 120 documents")
    assert any("s left" in line for line in lines[1:])
    assert lines[-1].startswith("predictors: 100 % trained, about 0 s left")
    shares = [int(line.split()[1]) for line in lines[1:]]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 100


def test_predictors_of_layers_do_not_depend_on_each_other():
    x, job = random_job()
    options = PredictorOptions(epochs=2, batch_tokens=64, rank=5)
    alone = Job(job.score[1:], job.kth[1:], job.signed, LowRank.random([1], _rms(x[1:]), 20, 5, 0), torch.zeros(1))
    train(x, [job], [0, 1], options, 0, lambda done: None)
    train(x[1:], [alone], [1], options, 0, lambda done: None)
    for name, value in alone.stack.matrices(0, torch.float32).items():
        torch.testing.assert_close(value, job.stack.matrices(1, torch.float32)[name], rtol=1e-4, atol=1e-5)


def _rms(x):
    return x.square().mean(1).sqrt()
