"""What every method must do, registered here or named as ``module:Class``."""

import dataclasses
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch

from kernels_numba.reference import low_rank_scale
from suite.errors import InputError
from suite.methods.base import NEURONS, Calibrated, Factor, Method, Site, kept_count, select_top_k
from suite.modeling.attach import attach
from suite.modeling.decode import has_kernel
from suite.modeling.gated_mlp import find_gated_mlps
from suite.registry import METHODS, get_method, method_class
from tests.conftest import D_FF, PAD, WIDTH, State, activations, logits, predictor_fit, random_fit, tiny_model
from tests.contract import third_party
from tests.modeling import site_methods

THIRD_PARTY = "tests.contract.third_party:PowerOfUp"
UNREGISTERED = [
    f"{module.__name__}:{cls.__name__}"
    for module in (third_party, site_methods)
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, Method) and cls not in (Method, *site_methods.WRONG)
]
ALL = [*METHODS, *UNREGISTERED]
RANKING = [name for name in ALL if "ideal" in method_class(name).modes]
FIXED = [name for name in ALL if method_class(name).fixed_set]
WITH_THRESHOLD = [name for name in ALL if get_method(name).needs_threshold]
WITH_PREDICTOR = [
    name for name in ALL if "practical" in method_class(name).modes and method_class(name).needs_predictor
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


PROMPT = 4  # tokens before the first in scope, where a method ranks by them


@contextmanager
def ideal(model, method, mask=None):
    """Attached with a random fit where the score asks for one; after a prompt in every row of twelve where it needs one."""
    state = random_fit(method, model.dtype) if method.needs_calibration else None
    mode = None if method.modes == ("none",) else "ideal"
    with attach(model, method, state, mode=mode) as attached, ExitStack() as scope:
        if method.needs_prompt:
            mask = torch.ones(2, 12, dtype=torch.int64) if mask is None else mask
            rows, columns = ((mask.cumsum(-1) > PROMPT) & (mask > 0)).nonzero(as_tuple=True)
            scope.enter_context(attached.positions(rows, columns, rows, columns))
        yield attached


def at_sites(method, **options):
    """What the method scores, of each of its sites."""
    return [activations(site=site, **options) for site in method.sites]


def realised_by(method):
    """Share that the ideal mode drops, by layer and site, in whole entries."""
    return {
        (layer, site): 1 - kept_count(WIDTH[site], method.sparsity_at(Site(site, layer, WIDTH[site]))) / WIDTH[site]
        for layer in range(2)
        for site in method.sites
    }


def n_sparse(method, n_rows, width=12):
    return n_rows * (width - PROMPT * method.needs_prompt)


@pytest.fixture(scope="module")
def dense(ids):
    """Logits of a tiny model that nothing is attached to, by architecture and type."""
    return cache(lambda architecture, dtype=torch.float32: logits(tiny_model(architecture, dtype), ids))


@pytest.mark.parametrize("name", ALL)
def test_is_a_frozen_dataclass_under_its_name(name):
    method = get_method(name)
    assert dataclasses.is_dataclass(method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.sparsity = 0.5
    if name in METHODS:
        assert method.name == name
    assert method.parameters()["sparsity"] == 0


@pytest.mark.parametrize("name", ALL)
def test_refuses_sparsity_outside_its_range(name):
    for sparsity in (-0.1, 1, 1.5, float("nan"), "0.5", True, None):
        with pytest.raises(InputError, match="sparsity"):
            get_method(name, sparsity=sparsity)


@pytest.mark.parametrize("name", ALL)
def test_its_share_of_a_site_is_a_sparsity_and_none_where_that_is_zero(name):
    for sparsity in (0.0,) if name not in RANKING else (0.0, 0.05, 0.5, 0.999):
        method = get_method(name, sparsity=sparsity)
        for site in method.sites:
            for layer in range(2):
                share = method.sparsity_at(Site(site, layer, WIDTH[site]))
                assert 0 <= share < 1
                assert share == 0 or sparsity > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_scores_every_entry_of_every_token(name, dtype):
    method = get_method(name)
    again = at_sites(method, dtype=dtype)
    for inputs, same in zip(at_sites(method, dtype=dtype), again, strict=True):
        score = method.score(inputs)
        assert score.shape == (5, WIDTH[inputs.site.name])
        assert score.is_floating_point()
        assert torch.equal(score, get_method(name).score(same))  # deterministic, no state


@pytest.mark.parametrize("name", ALL)
def test_score_of_a_token_does_not_depend_on_the_others(name):
    method, chosen = get_method(name), torch.tensor([4, 1])
    # of a factor products of 32 and of 4 terms, which a batch may sum in another order
    rounding = (32 + 4) * torch.finfo(torch.float32).eps * bool(method.factors)
    for inputs in at_sites(method, n_tokens=6):
        keys = {field: getattr(inputs, field)[chosen] for field in ("documents", "positions")}
        prompts = inputs.prompt[chosen]
        alone = dataclasses.replace(inputs, rows=chosen, prompts=lambda prompts=prompts: prompts, **keys)
        torch.testing.assert_close(method.score(alone), method.score(inputs)[chosen], rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RANKING)
def test_keeps_exactly_k_of_each_token(name, dtype):
    for inputs in at_sites(get_method(name), d_ff=1000, dtype=dtype):  # bf16 ties are many
        for sparsity in (0.0, 0.29, 0.5, 0.9, 0.999):
            method = get_method(name, sparsity=sparsity)
            k = kept_count(inputs.site.width, method.sparsity_at(inputs.site))
            assert (select_top_k(method.score(inputs), k).sum(-1) == k).all()


def reads(method, inputs, **others):
    """Whether other values of some fields change the score: noise reads the keys of a token, a fixed set no activation."""
    return not torch.equal(method.score(inputs), method.score(dataclasses.replace(inputs, **others)))


@pytest.mark.parametrize("name", RANKING)
def test_keeps_exactly_k_where_all_scores_tie(name):
    method = get_method(name)
    for inputs in at_sites(method):
        if reads(method, inputs, documents=inputs.documents + 1):
            continue
        known, ones = inputs.calibrated, torch.ones(D_FF)
        low = Factor(torch.ones(32, 1), torch.ones(D_FF, 1), ones)
        moments = {quantity: torch.ones_like(value) for quantity, value in known.moments.items()}
        tied = dataclasses.replace(
            inputs,
            values={quantity: torch.ones_like(value) for quantity, value in inputs.values.items()},
            norms=lambda matrix, of, norms=inputs.norms: torch.ones_like(norms(matrix, of)),
            calibrated=Calibrated(moments, dict.fromkeys(known.factors, low)),
            prompts=lambda ones=ones: ones.expand(5, -1),
        )
        keep = select_top_k(method.score(tied), 7)
        assert keep[:, :7].all()
        assert not keep[:, 7:].any()


@pytest.mark.parametrize("name", RANKING)
def test_nan_activation_is_kept_and_reaches_the_output(name):
    method = get_method(name)
    for inputs in at_sites(method):
        if not reads(method, inputs, values=activations(site=inputs.site.name, seed=1).values):
            continue
        assert not method.fixed_set
        for part in ("gate", "act", "up", "product") if inputs.site.name == NEURONS else ("input",):
            inputs.values[part][2, 5] = torch.nan
        keep = select_top_k(method.score(inputs), 1)
        assert keep[2].nonzero().flatten().tolist() == [5]
        assert (keep.sum(-1) == 1).all()


# a score sees of the model its type and its activation function alone: not every pair
@pytest.mark.parametrize(("architecture", "dtype"), zip(("llama", "gemma2", "phi3"), DTYPES, strict=True))
@pytest.mark.parametrize("name", ALL)
def test_sparsity_zero_is_dense_bit_for_bit(name, architecture, dtype, ids, dense):
    model = tiny_model(architecture, dtype)
    with ideal(model, get_method(name)) as attached:
        assert torch.equal(logits(model, ids), dense(architecture, dtype))
    assert attached.realised == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RANKING)
def test_realises_its_sparsity_exactly_and_restores_the_model(name, dtype, ids, dense):
    model, before = tiny_model("qwen2", dtype), dense("qwen2", dtype)
    method = get_method(name, sparsity=0.7)
    with ideal(model, method) as attached:
        sparse = logits(model, ids)
        again = logits(model, ids)
    assert not torch.equal(sparse, before)
    assert torch.equal(sparse, again)
    realised = {(row.layer, row.site): row.sparsity_realized for row in attached.sparsity()}
    assert realised == pytest.approx(realised_by(method), abs=1e-12)
    assert {row.n_tokens for row in attached.sparsity()} == {2 * n_sparse(method, 2)}
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("name", RANKING)
def test_padding_is_neither_counted_nor_felt(name, ids):
    model = tiny_model("llama")
    method = get_method(name, sparsity=0.6)
    with ideal(model, method, torch.ones(1, 12)):
        alone = logits(model, ids[:1])
    for side in ("left", "right"):
        filler = torch.full((1, 4), PAD)
        parts = (filler, ids[:1]) if side == "left" else (ids[:1], filler)
        padded = torch.cat(parts, dim=1)
        mask = torch.cat([torch.zeros_like(p) if p is filler else torch.ones_like(p) for p in parts], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with ideal(model, method, mask) as attached:
            out = logits(model, padded, attention_mask=mask, position_ids=positions)
        kept = out[:, 4:] if side == "left" else out[:, :-4]
        torch.testing.assert_close(kept, alone, rtol=0, atol=1e-4)
        assert [row.n_tokens for row in attached.sparsity()] == [n_sparse(method, 1)] * len(realised_by(method))


@pytest.mark.parametrize("name", WITH_THRESHOLD)
def test_threshold_keeps_scores_not_below_it(name, ids):
    model = tiny_model("llama")
    method = get_method(name, sparsity=0.5)
    order = [(layer, site) for site in method.sites for layer in range(2)]
    for infinite in ([], order, order[1:2]):  # none, all, and one alone
        thresholds = {place: torch.inf if place in infinite else -torch.inf for place in order}
        state = random_fit(method, thresholds=torch.tensor(list(thresholds.values())))
        with attach(model, method, state) as attached:
            logits(model, ids)
        assert {(row.layer, row.site): row.threshold for row in attached.sparsity()} == thresholds
        assert {(row.layer, row.site) for row in attached.sparsity() if row.sparsity_realized == 1} == set(infinite)
        assert attached.realised == len(infinite) / len(order)


@pytest.mark.parametrize("kind", ["low-rank", "ternary", "gated"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WITH_PREDICTOR)
def test_predictor_keeps_logits_not_below_its_threshold(name, dtype, kind, ids, dense):
    if kind == "gated" and not method_class(name).predicted:
        pytest.skip("its score is not made of projections")
    model = tiny_model("llama", dtype)
    method, before = get_method(name, sparsity=0.5), dense("llama", dtype)
    shares = []
    low, high = (1.0, 3.0) if kind == "gated" else (-1.0, 1.0)
    for threshold in (-torch.inf, low, high, torch.inf, torch.nan):
        state = predictor_fit(name, kind=kind, threshold=threshold)
        if threshold != threshold:
            with pytest.raises(InputError, match="NaN threshold"), attach(model, method, state):
                pass
            continue
        with attach(model, method, state) as attached:
            sparse = logits(model, ids)
        assert torch.equal(sparse, before) == (threshold == -torch.inf)
        shares.append(attached.realised)
        assert attached.sparsity()[0].threshold == threshold
    assert shares[0] == 0 < shares[1] < shares[2] < shares[3] == 1
    assert torch.equal(logits(model, ids), before)


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
        attach(model, get_method(name, sparsity=0.5), State(method_class(name).name, 0.5, torch.zeros(2))).__enter__()
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
    if "practical" in method.modes and not method.fixed_set:
        match = "predictor" if method.needs_predictor else "needs a fit"
        with pytest.raises(InputError, match=match), attach(tiny_model("llama"), method, mode="practical"):
            pass
    if method.needs_calibration:
        with pytest.raises(InputError, match="fit of its moments"), attach(tiny_model("llama"), method, mode="ideal"):
            pass


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


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_set_is_the_same_in_both_modes_and_takes_no_threshold(name, ids):
    model, method = tiny_model("llama"), get_method(name, sparsity=0.5)
    state = random_fit(method) if method.needs_calibration else None
    rows, columns = (torch.ones(2, 8) > 0).nonzero(as_tuple=True)
    found = []
    for mode in method.modes:
        with (
            attach(model, method, state, mode=mode) as attached,
            attached.positions(rows, columns + PROMPT, rows, columns + PROMPT),
        ):
            found.append(logits(model, ids))
            assert {row.threshold for row in attached.sparsity()} == {None}
            realised = {(row.layer, row.site): row.sparsity_realized for row in attached.sparsity()}
            assert realised == pytest.approx(realised_by(method), abs=1e-12)
    assert torch.equal(found[0], found[-1])
    if state is None:
        with pytest.raises(InputError, match="a fit was given"):
            attach(model, method, State(method.name, 0.5, torch.zeros(2)), mode=method.modes[-1]).__enter__()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_a_scale_of_the_neurons_makes_the_score_of_the_first_projection(name, dtype):
    inputs, method = activations(dtype=dtype), get_method(name)
    scale = method.neuron_scale(inputs.calibrated)
    if scale is None:
        return
    assert (scale.shape, scale.dtype) == ((D_FF,), torch.float32)
    first = {"gate": inputs.act, "up": inputs.up}[method.first_projection]
    assert torch.equal(method.score(inputs), first.abs().float() * scale)


def variants(name):
    """The method with every value of what its fit or its user chooses of a factor."""
    method = get_method(name)
    values = {"exact": ("up", "gate"), "predictor_input": ("mlp", "block")}
    names = [one for one in values if one in method.parameters()]
    return [
        dataclasses.replace(method, **dict(zip(names, chosen, strict=True)))
        for chosen in product(*map(values.get, names))
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_a_low_rank_makes_the_score_of_the_first_projection(name, dtype):
    """In float64 from its matrices, as the reference of the kernels has it."""
    for method in variants(name):
        inputs = activations(dtype=dtype)
        low = method.low_rank(inputs.calibrated)
        if low is None:
            continue
        assert method.neuron_scale(inputs.calibrated) is None
        seen = inputs.block if method.predictor_input == "block" else inputs.input
        act = "silu" if method.exact_projection == "up" else None
        scale = torch.from_numpy(np.stack([low_rank_scale(low, token, act) for token in seen.double().numpy()]))
        first = {"gate": inputs.act, "up": inputs.up}[method.exact_projection]
        # sums of 32 and of 4 products, an activation, a root: in fp32, and where the input is fp64 in fp64
        rounding, fine = ((32 + 4 + 8) * torch.finfo(wide).eps for wide in (torch.float32, torch.float64))
        wide = low.rms(seen.double(), inputs.act_fn if act else None)
        torch.testing.assert_close(wide, scale, rtol=fine, atol=fine)
        torch.testing.assert_close(
            method.score(inputs).double(), first.abs().double() * scale, rtol=rounding, atol=rounding
        )
        assert has_kernel(method)


@pytest.mark.parametrize("name", METHODS)
def test_names_its_source(name):
    assert method_class(name).source
