"""What every method must do, registered here or named as ``module:Class``."""

import dataclasses

import pytest
import torch

from suite.errors import InputError
from suite.methods.base import Site, kept_count, select_top_k
from suite.modeling.attach import attach
from suite.modeling.gated_mlp import find_gated_mlps
from suite.registry import METHODS, get_method, method_class
from tests.conftest import D_FF, PAD, activations, predictor_fit, tiny_model

THIRD_PARTY = "tests.contract.third_party:PowerOfUp"
ALL = [*METHODS, THIRD_PARTY]
RANKING = [name for name in ALL if "ideal" in method_class(name).modes]
WITH_THRESHOLD = [
    name for name in ALL if "practical" in method_class(name).modes and not method_class(name).needs_predictor
]
WITH_PREDICTOR = [
    name for name in ALL if "practical" in method_class(name).modes and method_class(name).needs_predictor
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass
class State:
    method: str
    sparsity: float
    thresholds: torch.Tensor


def logits(model, ids, **kwargs):
    with torch.inference_mode():
        return model(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize("name", ALL)
def test_is_a_frozen_dataclass_under_its_name(name):
    method = get_method(name)
    assert dataclasses.is_dataclass(method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.sparsity = 0.5
    if name in METHODS:
        assert method.name == name
    assert method.parameters()["sparsity"] == 0


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, float("nan"), "0.5", True, None])
@pytest.mark.parametrize("name", ALL)
def test_refuses_sparsity_outside_its_range(name, sparsity):
    with pytest.raises(InputError, match="sparsity"):
        get_method(name, sparsity=sparsity)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_scores_every_neuron_of_every_token(name, dtype):
    inputs = activations(dtype=dtype)
    score = get_method(name).score(inputs)
    assert score.shape == inputs.up.shape
    assert score.is_floating_point()
    assert torch.equal(score, get_method(name).score(activations(dtype=dtype)))  # deterministic, no state


@pytest.mark.parametrize("name", ALL)
def test_score_of_a_token_does_not_depend_on_the_others(name):
    inputs = activations(n_tokens=6)
    chosen = torch.tensor([4, 1])
    keys = {field: getattr(inputs, field)[chosen] for field in ("documents", "positions")}
    alone = dataclasses.replace(inputs, rows=chosen, **keys)
    method = get_method(name)
    assert torch.equal(method.score(alone), method.score(inputs)[chosen])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", RANKING)
def test_keeps_exactly_k_of_each_token(name, sparsity, dtype):
    k = kept_count(1000, sparsity)
    score = get_method(name, sparsity=sparsity).score(activations(d_ff=1000, dtype=dtype))  # bf16 ties are many
    assert (select_top_k(score, k).sum(-1) == k).all()


@pytest.mark.parametrize("name", [name for name in RANKING if name != "random"])
def test_keeps_exactly_k_where_all_scores_tie(name):
    inputs = activations()
    tied = dataclasses.replace(
        inputs,
        values={name: torch.ones_like(value) for name, value in inputs.values.items()},
        norms=lambda matrix, of: torch.ones(D_FF),
    )
    keep = select_top_k(get_method(name).score(tied), 7)
    assert keep[:, :7].all()
    assert not keep[:, 7:].any()


@pytest.mark.parametrize("name", [name for name in RANKING if name != "random"])
def test_nan_activation_is_kept_and_reaches_the_output(name):
    inputs = activations()
    for part in inputs.values.values():
        part[2, 5] = torch.nan
    keep = select_top_k(get_method(name).score(inputs), 1)
    assert keep[2].nonzero().flatten().tolist() == [5]
    assert (keep.sum(-1) == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("name", ALL)
def test_sparsity_zero_is_dense_bit_for_bit(name, architecture, dtype, ids):
    model = tiny_model(architecture, dtype)
    dense = logits(model, ids)
    with attach(model, get_method(name)) as attached:
        assert torch.equal(logits(model, ids), dense)
    assert attached.realised == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RANKING)
def test_realises_its_sparsity_exactly_and_restores_the_model(name, dtype, ids):
    model = tiny_model("qwen2", dtype)
    dense = logits(model, ids)
    with attach(model, get_method(name, sparsity=0.7)) as attached:
        sparse = logits(model, ids)
        again = logits(model, ids)
    assert not torch.equal(sparse, dense)
    assert torch.equal(sparse, again)
    expected = 1 - kept_count(D_FF, 0.7) / D_FF
    assert [layer.sparsity_realized for layer in attached.sparsity()] == pytest.approx([expected] * 2, abs=1e-12)
    assert [layer.n_tokens for layer in attached.sparsity()] == [2 * ids.numel()] * 2
    assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("name", RANKING)
def test_padding_is_neither_counted_nor_felt(name, ids):
    model = tiny_model("llama")
    method = get_method(name, sparsity=0.6)
    with attach(model, method) as attached:
        alone = logits(model, ids[:1])
        for side in ("left", "right"):
            attached.reset()
            filler = torch.full((1, 4), PAD)
            parts = (filler, ids[:1]) if side == "left" else (ids[:1], filler)
            padded = torch.cat(parts, dim=1)
            mask = torch.cat([torch.zeros_like(p) if p is filler else torch.ones_like(p) for p in parts], dim=1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            out = logits(model, padded, attention_mask=mask, position_ids=positions)
            kept = out[:, 4:] if side == "left" else out[:, :-4]
            torch.testing.assert_close(kept, alone, rtol=0, atol=1e-4)
            assert [layer.n_tokens for layer in attached.sparsity()] == [ids.shape[1]] * 2


@pytest.mark.parametrize("name", WITH_THRESHOLD)
def test_threshold_keeps_scores_not_below_it(name, ids):
    model = tiny_model("llama")
    method = get_method(name, sparsity=0.5)
    for threshold, share in ((-torch.inf, 0.0), (torch.inf, 1.0)):
        state = State(method.name, 0.5, torch.full((2,), threshold))
        with attach(model, method, state) as attached:
            logits(model, ids)
        assert attached.realised == share
        assert attached.sparsity()[0].threshold == threshold


@pytest.mark.parametrize("kind", ["low-rank", "ternary"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WITH_PREDICTOR)
def test_predictor_keeps_logits_not_below_its_threshold(name, dtype, kind, ids):
    model = tiny_model("llama", dtype)
    method = get_method(name, sparsity=0.5)
    dense = logits(model, ids)
    shares = []
    for threshold in (-torch.inf, -1.0, 1.0, torch.inf, torch.nan):
        state = predictor_fit(name, kind=kind, threshold=threshold)
        if threshold != threshold:
            with pytest.raises(InputError, match="NaN threshold"), attach(model, method, state):
                pass
            continue
        with attach(model, method, state) as attached:
            sparse = logits(model, ids)
        assert torch.equal(sparse, dense) == (threshold == -torch.inf)
        shares.append(attached.realised)
        assert attached.sparsity()[0].threshold == threshold
    assert shares[0] == 0 < shares[1] < shares[2] < shares[3] == 1
    assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("kind", ["low-rank", "ternary"])
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_predictor_drops_what_its_logits_say(kind, architecture, ids):
    model = tiny_model(architecture)
    state = predictor_fit(kind=kind, threshold=0.3)
    method = get_method("d-countdown", sparsity=0.5)
    columns, rows = torch.arange(12)[3:], torch.ones(9, dtype=torch.int64)
    seen, handles = {}, []
    for mlp in find_gated_mlps(model):

        def drop(_module, args, mlp=mlp):
            x, v = seen.pop(mlp.layer), args[0].clone()
            if state.scale is None:
                logit = x @ state.v[mlp.layer] @ state.u[mlp.layer].T
            else:
                logit = x @ state.u[mlp.layer].T.float() * state.scale[mlp.layer]
            v[1, 3:] = v[1, 3:] * (logit[1, 3:] >= 0.3)
            return (v,)

        def record(_module, args, mlp=mlp):
            seen[mlp.layer] = args[0]

        handles.append(mlp.module.register_forward_pre_hook(record))
        handles.append(mlp.module.down_proj.register_forward_pre_hook(drop))
    by_hand = logits(model, ids)
    for handle in handles:
        handle.remove()
    with attach(model, method, state) as attached, attached.positions(rows, columns, rows, columns):
        ours = logits(model, ids)
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-4)
    assert [layer.n_tokens for layer in attached.sparsity()] == [9, 9]


@pytest.mark.parametrize("name", WITH_PREDICTOR)
def test_predictor_and_thresholds_do_not_stand_in_for_each_other(name):
    model = tiny_model("llama")
    with pytest.raises(InputError, match="needs a trained predictor"):
        attach(model, get_method(name, sparsity=0.5), State(name, 0.5, torch.zeros(2))).__enter__()
    with pytest.raises(InputError, match="needs a fit of its thresholds"):
        attach(model, get_method("cats", sparsity=0.5), predictor_fit("cats")).__enter__()
    for state, match in (
        (predictor_fit(name, sparsity=0.6), "at sparsity 0.6, not of"),
        (predictor_fit(name, d_ff=40), r"\(d_model, d_ff\) = \(32, 40\), the model's are \(32, 48\)"),
        (predictor_fit(name, thresholds=torch.zeros(3)), "3 thresholds"),
    ):
        with pytest.raises(InputError, match=match):
            attach(model, get_method(name, sparsity=0.5), state).__enter__()


@pytest.mark.parametrize("name", ALL)
def test_modes_that_it_has_not_are_refused(name):
    method = get_method(name)
    for mode in {"none", "ideal", "practical", "fast"} - set(method.modes):
        with pytest.raises(InputError, match="mode"), attach(tiny_model("llama"), method, mode=mode):
            pass
    if "practical" in method.modes:
        match = "predictor" if method.needs_predictor else "needs a fit"
        with pytest.raises(InputError, match=match), attach(tiny_model("llama"), method, mode="practical"):
            pass


def test_random_noise_does_not_depend_on_the_batch(ids):
    model, method = tiny_model("llama"), get_method("random", sparsity=0.5, seed=3)
    whole = torch.arange(12)

    def run(rows, documents):
        index = torch.arange(len(rows)).repeat_interleave(12)
        columns = whole.repeat(len(rows))
        keys = torch.tensor(documents).repeat_interleave(12)
        with attach(model, method) as attached, attached.positions(index, columns, keys, columns):
            return logits(model, ids[rows])

    together, alone = run([0, 1], [10, 11]), run([1], [11])
    torch.testing.assert_close(together[1], alone[0], rtol=0, atol=1e-4)
    assert not torch.allclose(run([1], [12])[0], alone[0], atol=1e-2)


def test_random_noise_is_uniform_and_differs_by_every_key():
    inputs = activations(n_tokens=40, d_ff=1000)
    score = get_method("random", seed=1).score(inputs)
    # mean of 40000 uniforms: standard error 1 / sqrt(12 * 40000); 5 of them
    assert abs(score.mean() - 0.5) < 5 / (12 * 40000) ** 0.5
    others = [
        get_method("random", seed=2).score(inputs),
        get_method("random", seed=1).score(dataclasses.replace(inputs, site=Site("mlp.neurons", 1, 1000))),
        get_method("random", seed=1).score(dataclasses.replace(inputs, documents=inputs.documents + 1)),
        get_method("random", seed=1).score(dataclasses.replace(inputs, positions=inputs.positions + 1)),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([score.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / 40000**0.5


def test_names_that_are_no_method():
    for name, match in (
        ("m-countdwn", "did you mean 'm-countdown'"),
        ("no.such.module:Class", "cannot be loaded"),
        ("tests.contract.third_party:Nothing", "cannot be loaded"),
        ("tests.contract.third_party:NoMethod", "not a subclass"),
    ):
        with pytest.raises(InputError, match=match):
            get_method(name)
    with pytest.raises(InputError, match="did you mean 'sparsity'"):
        get_method("cats", sparsty=0.5)
    assert get_method(THIRD_PARTY, power=3.0).parameters() == {"sparsity": 0.0, "power": 3.0}
