"""Fits on tiny models, against sorting by hand; artifacts; keys."""

import dataclasses
import math

import pytest
import torch
from hypothesis import example as explicit
from hypothesis import given, settings
from hypothesis import strategies as st

from suite import attach, fit, get_method
from suite.errors import CellError, InputError
from suite.fitting import thresholds as module
from suite.fitting.artifacts import Fit, PredictorFit, load_fit, save_fit
from suite.fitting.histogram import ScoreHistogram, exact_quantile
from suite.fitting.keys import ESTIMATORS, fit_key
from suite.modeling.gated_mlp import find_gated_mlps
from suite.modeling.loading import weights_fingerprint
from tests.conftest import D_FF, predictor_fit
from tests.fitting.conftest import flip, loaded


@pytest.mark.parametrize("name", ["cats", "m-countdown"])
@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.9])
def test_calibrated_realises_its_target_on_held_out_text(tmp_path, text, name, sparsity):
    # of 61 tokens and 48 neurons: the shares of 1024 held-out tokens would scatter by more than .005
    much = dataclasses.replace(text, max_tokens=16384)
    made = fit(loaded(tmp_path), get_method(name, sparsity=sparsity), much)
    assert made.meta["held_out_sparsity_mean"] == pytest.approx(sparsity, abs=0.005)
    assert made.thresholds.dtype == torch.float32
    assert made.thresholds.shape == (2,)
    assert (made.meta["n_tokens"], made.meta["held_out_tokens"]) == (12288, 4096)


@pytest.mark.parametrize("architecture", ["gemma2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_of_half_precision_do_not_move_the_target(tmp_path, text, architecture, dtype):
    made = fit(loaded(tmp_path, architecture, dtype), get_method("cats", sparsity=0.7), text)
    assert made.meta["held_out_sparsity_mean"] == pytest.approx(0.7, abs=0.01)


def scores_by_hand(model, windows, thresholds):
    """abs(u) of every token and layer, layers with a threshold being sparse; the model's own modules, one by one."""
    found = [[] for _ in range(2)]
    mlps = find_gated_mlps(model)
    handles = []
    for mlp in mlps:

        def record(_module, args, output, mlp=mlp):
            found[mlp.layer].append(output.abs().flatten(0, 1))

        def drop(_module, args, mlp=mlp):
            if thresholds[mlp.layer] is None:
                return None
            return (args[0] * (found[mlp.layer][-1].view_as(args[0]) >= thresholds[mlp.layer]),)

        handles.append(mlp.module.up_proj.register_forward_hook(record))
        handles.append(mlp.module.down_proj.register_forward_pre_hook(drop))
    with torch.no_grad():
        for window in windows:
            model(torch.tensor([window]))
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in found]


def test_estimators_are_what_they_say(tmp_path, text):
    model = loaded(tmp_path)
    method = get_method("m-countdown", sparsity=0.6)
    windows = module.make_windows(text, model.tokenizer, 0).fit
    dense = scores_by_hand(model.model, windows, [None, None])
    k = D_FF - math.floor(0.6 * D_FF)
    expected = {
        "mean-kth": [scores.topk(k).values[:, -1].mean() for scores in dense],
        "pooled-quantile": [scores.quantile(0.6) for scores in dense],
    }
    first = float(dense[0].quantile(0.6))
    expected["calibrated"] = [first, scores_by_hand(model.model, windows, [first, None])[1].quantile(0.6)]
    for estimator in ESTIMATORS:
        found = fit(model, method, text, estimator=estimator).thresholds
        torch.testing.assert_close(found, torch.tensor(expected[estimator]), rtol=2e-3, atol=0, msg=estimator)
    # the second layer really was calibrated behind a sparse first one
    assert expected["calibrated"][1] != pytest.approx(float(expected["pooled-quantile"][1]), rel=2e-3)


def test_more_text_than_a_chunk_streams_to_the_same_thresholds(tmp_path, text, monkeypatch):
    model, method = loaded(tmp_path), get_method("cats", sparsity=0.7)
    for estimator in ESTIMATORS:
        whole = fit(model, method, text, estimator=estimator)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_CHUNK", 512)
            parts = fit(model, method, text, estimator=estimator)
        torch.testing.assert_close(parts.thresholds, whole.thresholds, rtol=5e-3, atol=0)
        assert parts.meta["held_out_sparsity_mean"] == pytest.approx(whole.meta["held_out_sparsity_mean"], abs=2e-3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_same_text_same_fit(tmp_path, text, estimator):
    model, method = loaded(tmp_path), get_method("cats", sparsity=0.5)
    first, second = (fit(model, method, text, estimator=estimator) for _ in range(2))
    assert first.sha256 == second.sha256
    assert first.key == second.key
    other = fit(model, method, text, estimator=estimator, seed=1)
    assert other.key != first.key
    assert not torch.equal(other.thresholds, first.thresholds)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sparsity_zero_keeps_everything(tmp_path, text, estimator, ids):
    model, method = loaded(tmp_path), get_method("cats")
    made = fit(model, method, text, estimator=estimator)
    assert made.thresholds.tolist() == [-math.inf, -math.inf]
    with torch.inference_mode():
        dense = model.model(ids).logits
        with attach(model.model, method, made) as attached:
            assert torch.equal(model.model(ids).logits, dense)
    assert attached.realised == 0


def test_a_method_of_the_users_own_is_fitted(tmp_path, text):
    spec = "tests.contract.third_party:PowerOfUp"
    model = loaded(tmp_path)
    made = fit(model, get_method(spec, sparsity=0.5, power=1.0), text)
    own = fit(model, get_method("m-countdown", sparsity=0.5), text)
    assert torch.equal(made.thresholds, own.thresholds)
    assert made.key != own.key


def test_key_is_known_before_the_fit(tmp_path, text):
    model = loaded(tmp_path)
    rest = (weights_fingerprint(model.ref), text.fingerprint(), text.max_tokens, 0, "float32")
    made = fit(model, get_method("cats", sparsity=0.5), text)
    assert made.key == fit_key("cats", {}, 0.5, "calibrated", *rest)
    own = "tests.contract.third_party:PowerOfUp"
    power = fit(model, get_method(own, sparsity=0.5), text).key
    assert power == fit_key(own, {}, 0.5, "calibrated", *rest) == fit_key(own, {"power": 2.0}, 0.5, "calibrated", *rest)
    keys = {made.key, power, fit_key(own, {"power": 3.0}, 0.5, "calibrated", *rest)}
    keys.add(fit_key("cats", {}, 0.6, "calibrated", *rest))
    keys.add(fit_key("cats", {}, 0.5, "mean-kth", *rest))
    for index in range(len(rest)):
        changed = list(rest)
        changed[index] = 99
        keys.add(fit_key("cats", {}, 0.5, "calibrated", *changed))
    assert len(keys) == 10


def test_what_cannot_be_fitted(tmp_path, text):
    model = loaded(tmp_path)
    for name in ("random", "dense"):
        with pytest.raises(InputError, match="no threshold to fit"):
            fit(model, get_method(name), text)
    with pytest.raises(InputError, match="unknown estimator 'calibratd'; did you mean 'calibrated'"):
        fit(model, get_method("cats", sparsity=0.5), text, estimator="calibratd")


def test_nan_activations_fail_and_never_become_a_threshold(tmp_path, text):
    model = loaded(tmp_path)
    weight = model.model.model.layers[0].mlp.up_proj.weight
    before = weight.data[3].clone()
    weight.data[3] = torch.nan
    try:
        for estimator in ESTIMATORS:
            with pytest.raises(CellError, match="NaN"):
                fit(model, get_method("m-countdown", sparsity=0.5), text, estimator=estimator)
    finally:
        weight.data[3] = before


numbers = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=300)


@settings(max_examples=200, deadline=None)
@given(numbers, st.floats(0.01, 0.99))
def test_exact_quantile_comes_as_near_as_ties_allow(values, share):
    scores = torch.tensor(values)
    threshold = exact_quantile(scores, share)
    ours = abs(float((scores < threshold).double().mean()) - share)
    candidates = [(scores < value).double().mean() for value in [*scores, torch.inf]]
    assert ours <= min(abs(float(found) - share) for found in candidates) + 1 / len(values)


@settings(max_examples=100, deadline=None)
@given(numbers, st.floats(0.01, 0.99))
@explicit([3.3995005992199223e38], 0.5)  # in the bin below infinity
def test_histogram_quantile_is_off_by_less_than_a_bin(values, share):
    scores = torch.tensor(values)
    histogram = ScoreHistogram()
    half = len(values) // 2
    histogram.add(scores[:half])
    histogram.add(scores[half:])  # parts add up
    threshold = histogram.quantile(share)
    rank = scores.sort().values[min(len(values) - 1, math.ceil(share * len(values)) - 1)].item()
    assert abs(threshold - rank) <= abs(rank) * 2**-8 + 1e-37


def test_histogram_on_many_scores():
    histogram = ScoreHistogram()
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 50_000, generator=generator)
    for part in scores:
        histogram.add(part)
    for share in (0.1, 0.5, 0.7, 0.9, 0.99):
        assert float((scores < histogram.quantile(share)).double().mean()) == pytest.approx(share, abs=2e-4)


def example(**changes):
    values = {
        "method": "cats",
        "sparsity": 0.5,
        "estimator": "calibrated",
        "thresholds": torch.tensor([0.25, -math.inf]),
        "key": "ab" * 32,
        "meta": {"model": "tiny", "model_fingerprint": "f", "n_tokens": 3},
    }
    return Fit(**values | changes)


def test_artifact_comes_back_as_it_was(tmp_path):
    path = save_fit(example(), tmp_path / "fits")
    for back in (load_fit(path), load_fit(path.parent, "ab" * 32), load_fit(path, model_fingerprint="f")):
        assert back.sha256 == example().sha256
        assert torch.equal(back.thresholds, example().thresholds)
        assert back.meta == example().meta
    assert [p.name for p in path.parent.iterdir()] == [f"{'ab' * 32}.safetensors"]


@pytest.mark.parametrize("kind", ["low-rank", "ternary"])
def test_predictor_artifact_comes_back_as_it_was(tmp_path, kind):
    made = predictor_fit(kind=kind, rank=3)
    path = save_fit(made, tmp_path)
    back = load_fit(path, model_fingerprint="f")
    assert isinstance(back, PredictorFit)
    assert back.sha256 == made.sha256
    x = torch.randn(4, 32)
    assert all(torch.equal(back.logits(layer, x), made.logits(layer, x)) for layer in (0, 1))
    hashes = {made.sha256, predictor_fit(kind=kind, rank=3, threshold=1).sha256}
    hashes |= {dataclasses.replace(made, u=made.u[::-1]).sha256, dataclasses.replace(made, meta={}).sha256}
    assert len(hashes) == 4
    flip(path)
    with pytest.raises(InputError, match="its hash differs"):
        load_fit(path)
    with pytest.raises(InputError, match="other weights"):
        load_fit(save_fit(made, tmp_path), model_fingerprint="g")


def test_hash_covers_thresholds_and_description():
    hashes = {example().sha256, example(thresholds=torch.zeros(2)).sha256, example(sparsity=0.6).sha256}
    hashes |= {example(meta={}).sha256, example(estimator="mean-kth").sha256, example(key="cd" * 32).sha256}
    assert len(hashes) == 6


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "is damaged"),
        (flip, "its hash differs"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"calibrated", b"calibratex")), "its hash differs"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"thresholds", b"thresholdz")), "is damaged"),
    ],
)
def test_damaged_artifacts(tmp_path, damage, match):
    path = save_fit(example(), tmp_path)
    damage(path)
    with pytest.raises(InputError, match=match):
        load_fit(tmp_path, "ab" * 32)


def test_artifact_of_another_model_or_key(tmp_path):
    path = save_fit(example(), tmp_path)
    with pytest.raises(InputError, match="other weights"):
        load_fit(path, model_fingerprint="g")
    path.rename(tmp_path / f"{'cd' * 32}.safetensors")
    with pytest.raises(InputError, match="key abab"):
        load_fit(tmp_path, "cd" * 32)


def test_fit_of_another_method_is_not_attached(tmp_path, text):
    model = loaded(tmp_path)
    made = fit(model, get_method("cats", sparsity=0.5), text)
    for other in (get_method("m-countdown", sparsity=0.5), get_method("cats", sparsity=0.6)):
        with pytest.raises(InputError, match="fit anew"), attach(model.model, other, made):
            pass
    assert dataclasses.replace(made, sparsity=0.6).sha256 != made.sha256
