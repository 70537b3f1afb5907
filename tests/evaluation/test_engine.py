"""The scorer against independent ways to the same number: plain forward passes, a dense cached prefix, other batches."""

import copy
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from suite import evaluate
from suite.errors import CellError
from suite.evaluation.engine import Scorer
from suite.evaluation.plan import Request, batches
from suite.modeling.attach import attach
from suite.registry import METHODS, get_method, method_class
from tests.conftest import random_fit, tiny_model

SPARSE = [name for name in METHODS if name != "dense"]


def requests(n, seed=0, longest=40):
    draw = np.random.default_rng(seed)
    made = []
    for document in range(n):
        length = int(draw.integers(3, longest))
        targets = int(draw.integers(1, length))
        ids = draw.integers(1, 257, length + 1).tolist()
        made.append(Request(tuple(ids[:-1]), tuple(ids[-targets:]), document))
    return made


def bound(tiny, n_scored):
    """fp32 rounding of a summed log-likelihood: eps * sqrt(reduction length) at each of the ~8 products of a layer."""
    config = tiny.model.config
    per_token = 8 * config.num_hidden_layers * np.finfo(np.float32).eps * np.sqrt(config.intermediate_size) * 10
    return per_token * n_scored


def plain_loglikelihood(model, request, logits=None):
    if logits is None:
        with torch.inference_mode():
            logits = model(torch.tensor([request.tokens])).logits[0]
    log_probs = torch.log_softmax(logits[-len(request.targets) :].double(), -1)
    return float(log_probs[range(len(request.targets)), list(request.targets)].sum())


def test_dense_scores_equal_a_plain_forward_pass(tiny):
    asked = requests(12)
    for request, score in zip(asked, Scorer(tiny.model, batch_size=5).score(asked, None, "scored"), strict=True):
        assert score.loglikelihood == pytest.approx(
            plain_loglikelihood(tiny.model, request), abs=bound(tiny, score.n_scored)
        )
        assert (score.n_scored, score.n_sparse) == (len(request.targets), 0)


def ideal(tiny, name, sparsity, **more):
    """The ideal mode of a method on a model, with a fit at random where its score asks for one."""
    method = get_method(name, sparsity=sparsity)
    state = random_fit(method, d_ff=tiny.model.config.intermediate_size) if method.needs_calibration else None
    return attach(tiny.model, method, state, mode="ideal", **more)


# not random: its noise is keyed by position, which the cached rest counts anew (see the batching test); not what ranks by
# the prompt, which the dense pass does not keep (test_sites.py)
@pytest.mark.parametrize("name", [name for name in SPARSE if name != "random" and not method_class(name).needs_prompt])
@pytest.mark.parametrize(("scope", "shift"), [("scored", 0), ("paper", 1)])
def test_sparse_scores_equal_a_dense_cached_prefix_and_a_sparse_rest(tiny, name, scope, shift):
    asked = requests(6, seed=1)
    with ideal(tiny, name, 0.7, scope=scope) as attached:
        scores = Scorer(tiny.model, batch_size=3).score(asked, attached, scope)
        counted = {layer.n_tokens for layer in attached.sparsity()}
    assert counted == {sum(len(r.targets) - shift for r in asked)}
    for request, score in zip(asked, scores, strict=True):
        start = len(request.tokens) - len(request.targets) + shift
        ids = torch.tensor([request.tokens])
        with torch.inference_mode():
            prefix = tiny.model(ids[:, :start], use_cache=True) if start else None
            logits = [] if prefix is None else [prefix.logits[0]]
            if start < ids.shape[1]:
                with ideal(tiny, name, 0.7, scope="all"):
                    cache = None if prefix is None else prefix.past_key_values
                    logits.append(tiny.model(ids[:, start:], past_key_values=cache).logits[0])
        expected = plain_loglikelihood(tiny.model, request, torch.cat(logits))
        assert score.loglikelihood == pytest.approx(expected, abs=bound(tiny, score.n_scored))
        assert score.n_sparse == len(request.targets) - shift


def test_sparsity_changes_the_score_of_every_method(tiny):
    # at .3 negative gates are among the kept, where CATS and signed Deja Vu differ; at .8 they agree on this model
    asked = requests(4, seed=2)
    scorer = Scorer(tiny.model, batch_size=4)
    dense = [s.loglikelihood for s in scorer.score(asked, None, "scored")]
    seen = {}
    for name in SPARSE:
        with ideal(tiny, name, 0.3) as attached:
            seen[name] = [s.loglikelihood for s in scorer.score(asked, attached, "scored")]
    for one, other in itertools.combinations([dense, *seen.values()], 2):
        assert np.abs(np.subtract(one, other)).max() > 1e-3


@pytest.mark.parametrize("name", SPARSE)
def test_batching_does_not_change_a_score(tiny, name):
    asked = requests(10, seed=3)
    results = []
    for batch_size in (1, 4, 10):
        with ideal(tiny, name, 0.6) as attached:
            results.append(
                [s.loglikelihood for s in Scorer(tiny.model, batch_size=batch_size).score(asked, attached, "all")]
            )
    tolerance = bound(tiny, max(len(r.targets) for r in asked))
    np.testing.assert_allclose(results[1], results[0], atol=tolerance)
    np.testing.assert_allclose(results[2], results[0], atol=tolerance)


def test_random_noise_follows_document_and_offset(tiny):
    one = requests(1, seed=4)[0]
    asked = [one, Request(one.tokens, one.targets, document=7), Request(one.tokens, one.targets, 0, offset=5)]
    with attach(tiny.model, get_method("random", sparsity=0.5)) as attached:
        scorer = Scorer(tiny.model, batch_size=1)
        first, other_document, other_place = (scorer.score([r], attached, "all")[0].loglikelihood for r in asked)
    assert first != other_document
    assert first != other_place


def test_scope_starts(tiny):
    request = Request(tuple(range(1, 11)), (8, 9, 10), 0)
    assert [request.first_sparse(scope) for scope in ("all", "scored", "paper")] == [0, 7, 8]


def test_a_one_token_answer_is_dense_under_scope_paper(tiny):
    request = Request((5, 6, 7), (8,), 0)
    dense = Scorer(tiny.model, batch_size=1).score([request], None, "paper")[0]
    with attach(tiny.model, get_method("cats", sparsity=0.9)) as attached:
        sparse = Scorer(tiny.model, batch_size=1).score([request], attached, "paper")[0]
    assert sparse == dense
    assert sparse.n_sparse == 0


def test_requests_with_equal_inputs_share_a_forward_pass(tiny):
    calls = []
    handle = tiny.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        asked = [Request((5, 6, 7), (target,), 0) for target in (8, 9, 10)]
        scores = Scorer(tiny.model, batch_size=1).score(asked, None, "scored")
    finally:
        handle.remove()
    assert len(calls) == 2  # their context, and the one token that is scored
    assert len({s.loglikelihood for s in scores}) == 3


def test_kl_and_agreement_against_an_independent_sum(tiny):
    asked = requests(5, seed=5)
    scorer = Scorer(tiny.model, batch_size=2)
    reference = scorer.dense_hidden(asked)
    for score in scorer.score(asked, None, "scored", reference=reference):
        assert score.kl == pytest.approx(0, abs=1e-5)
        assert score.agree == score.n_scored
    method = get_method("dejavu", sparsity=0.8)
    with attach(tiny.model, method, mode="ideal") as attached:
        scores = scorer.score(asked, attached, "all", reference=reference)
    for request, score in zip(asked, scores, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([request.tokens])
            dense = torch.log_softmax(tiny.model(ids).logits[0, -len(request.targets) :].double(), -1)
            with attach(tiny.model, method, mode="ideal", scope="all"):
                sparse = torch.log_softmax(tiny.model(ids).logits[0, -len(request.targets) :].double(), -1)
        assert score.kl == pytest.approx(float((dense.exp() * (dense - sparse)).sum()), rel=1e-4)
        assert score.agree == int((dense.argmax(-1) == sparse.argmax(-1)).sum())


def test_logits_that_are_not_finite_fail_the_cell(tiny):
    weight = tiny.model.lm_head.weight
    kept = weight[3, 0].item()
    with torch.no_grad():
        weight[3, 0] = float("nan")
        try:
            with pytest.raises(CellError, match="document 4"):
                Scorer(tiny.model, batch_size=1).score([Request((1, 2), (5,), 4)], None, "scored")
        finally:
            weight[3, 0] = kept


@pytest.mark.parametrize("logit", [-np.inf, np.inf])
def test_an_infinite_log_likelihood_fails_the_cell(tiny, logit):
    def spoil(_head, _args, logits):
        logits[..., 5] = logit
        return logits

    handle = tiny.model.lm_head.register_forward_hook(spoil)
    try:
        with pytest.raises(CellError, match="document 4 is -inf" if logit < 0 else "document 4 is nan"):
            Scorer(tiny.model, batch_size=1).score([Request((1, 2), (5,), 4)], None, "scored")
    finally:
        handle.remove()


def test_an_answer_is_greedy_only_if_every_token_of_it_is(tiny):
    def best(tokens):
        with torch.inference_mode():
            return int(tiny.model(torch.tensor([tokens])).logits[0, -1].argmax())

    context = (5, 6, 7)
    expected = {}
    for first, right in ((best(context), True), ((best(context) + 1) % 260, False)):
        second = best((*context, first))
        expected[Request((*context, first), (first, second), 0)] = right
        expected[Request((*context, first), (first, (second + 1) % 260), 0)] = False
    assert list(expected.values()) == [True, False, False, False]
    scores = Scorer(tiny.model, batch_size=4).score(list(expected), None, "scored")
    assert [score.greedy for score in scores] == list(expected.values())


def test_the_dense_reference_has_the_soft_cap_of_the_logits():
    model = copy.deepcopy(tiny_model("gemma2"))
    model.config.final_logit_softcapping = cap = 1.0
    asked = [Request((5, 6, 7, 8, 9), (8, 9, 10), 0), Request((11, 12), (13,), 1)]
    with torch.inference_mode():
        logits = model(torch.tensor([asked[0].tokens])).logits
    assert 0.6 * cap < logits.abs().max() <= cap  # so the cap bends them
    scorer = Scorer(model, batch_size=2)
    for score in scorer.score(asked, None, "scored", reference=scorer.dense_hidden(asked)):
        # 64 probabilities whose logarithms differ by fp32 rounding alone
        assert abs(score.kl) <= score.n_scored * 64 * np.finfo(np.float32).eps
        assert score.agree == score.n_scored


def test_batches_hold_every_request_once_within_the_limits():
    asked = requests(30, seed=6)
    seen = list(batches(asked, batch_size=4, max_tokens=80))
    assert sorted(itertools.chain(*seen)) == list(range(30))
    for batch in seen:
        assert len(batch) <= 4
        assert len(batch) == 1 or max(len(asked[i].tokens) for i in batch) * len(batch) <= 80
    lengths = [len(asked[i].tokens) for i in itertools.chain(*seen)]
    assert lengths == sorted(lengths, reverse=True)


def test_accuracy_calls_no_kernel_of_decode_steps(tiny, monkeypatch):
    """Its cells' keys do not cover them (`suite.code.CLOSED`)."""
    cats = get_method("cats", sparsity=0.5)
    fit = SimpleNamespace(method="cats", sparsity=0.5, thresholds=torch.full((2,), 1e-3))
    for name in ("kernels_numba.cpu", "kernels_numba.gpu.host.layers", "kernels_numba.gpu.host.active_set"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it raises
    with pytest.raises(ImportError), attach(tiny.model, cats, fit, backend="numba"):
        pass
    for state in (None, fit):
        found = evaluate(tiny, ["pack_generation", "pack_last_word"], cats, state=state, limit=2)
        assert [result.n_samples for result in found.values()] == [2, 2]
