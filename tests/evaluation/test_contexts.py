"""Shared dense contexts against whole forward passes: every architecture, sliding windows, budgets, what is sparse."""

import numpy as np
import pytest
import torch
import transformers

from suite.evaluation.contexts import can_share_contexts
from suite.evaluation.engine import Scorer
from suite.evaluation.plan import Plan, Request, make_segments
from suite.methods.base import kept_count, select_top_k
from suite.modeling.attach import attach, sparsified
from suite.registry import get_method
from tests.conftest import CONFIGS, VOCABULARY, tiny_model

EPS = np.finfo(np.float32).eps
WINDOW = 6  # shorter than the contexts below


def choices(n_documents=5, seed=0, longest=14):
    """Several continuations of unlike lengths for every context; the last document has no context at all."""
    draw = np.random.default_rng(seed)
    made = []
    for document in range(n_documents):
        context = draw.integers(3, VOCABULARY, int(draw.integers(2, longest))).tolist()
        for _ in range(3):
            answer = draw.integers(3, VOCABULARY, int(draw.integers(1, 6))).tolist()
            made.append(Request((*context, *answer)[:-1], tuple(answer), document))
    bare = draw.integers(3, VOCABULARY, 5).tolist()
    return [*made, Request(tuple(bare[:-1]), tuple(bare[1:]), n_documents)]


def sliding(architecture, window):
    """The architecture with the same weights and another window."""
    options = tiny_model(architecture).config.to_dict() | {"sliding_window": window, "layer_types": None}
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture](**options)).eval()


SLIDING = ("mistral", "gemma2", "gemma3", "phi3")
MODELS = [*CONFIGS, *(f"{name} sliding" for name in SLIDING)]


@pytest.fixture(params=MODELS)
def network(request):
    name, _, window = request.param.partition(" ")
    return sliding(name, WINDOW) if window else tiny_model(name)


def bound(model, n_scored):
    """fp32 rounding of a summed log-likelihood: eps * sqrt(reduction length) at each of the ~8 products of a layer."""
    config = model.config
    return 8 * config.num_hidden_layers * EPS * np.sqrt(config.intermediate_size) * 10 * n_scored


def scored(model, asked, method, scope, **options):
    """Scores, and tokens and kept neurons per layer."""
    scorer = Scorer(model, batch_size=4, **options)
    if method.name == "dense":
        return scorer.score(asked, None, scope), None
    with attach(model, method, mode="ideal", scope=scope) as attached:
        scores = scorer.score(asked, attached, scope)
        return scores, attached.sparsity()


@pytest.mark.parametrize("scope", ["scored", "paper"])
@pytest.mark.parametrize("name", ["dense", "random", "d-countdown"])
def test_sharing_changes_no_score_and_no_scope(network, name, scope):
    method = get_method(name) if name == "dense" else get_method(name, sparsity=0.7)
    asked = choices()
    shared, counted = scored(network, asked, method, scope)
    whole, expected = scored(network, asked, method, scope, share_contexts=False)
    assert can_share_contexts(network)
    assert counted == expected  # as many tokens in scope, exactly as many neurons kept
    for one, other in zip(shared, whole, strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=bound(network, one.n_scored))
        assert (one.greedy, one.n_scored, one.n_sparse) == (other.greedy, other.n_scored, other.n_sparse)


@pytest.mark.parametrize("name", SLIDING)
def test_a_short_window_decides_the_scores(name):
    """Or the sliding cases would test nothing."""
    near, far = (Scorer(sliding(name, w), batch_size=4).score(choices(), None, "scored") for w in (WINDOW, 100))
    assert max(abs(a.loglikelihood - b.loglikelihood) for a, b in zip(near, far, strict=True)) > 0.01


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_and_padding_change_no_score(network, batch_size):
    asked = choices(seed=1)
    expected, _ = scored(network, asked, get_method("cats", sparsity=0.5), "scored")
    with attach(network, get_method("cats", sparsity=0.5), mode="ideal") as attached:
        found = Scorer(network, batch_size=batch_size).score(asked, attached, "scored")
    for one, other in zip(found, expected, strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=bound(network, one.n_scored))


def test_a_choice_of_neurons_flips_only_between_equal_scores(network):
    """Scores of every layer, with the context apart and whole, each request alone so that tokens line up."""
    method = get_method("d-countdown", sparsity=0.7)
    for request in choices(seed=2):
        seen = []
        for share in (True, False):
            scores: list[torch.Tensor] = []

            def select(_layer, score, scores=scores):
                scores.append(score.clone())
                return select_top_k(score, kept_count(score.shape[-1], method.sparsity))

            with sparsified(network, method, select) as attached:
                Scorer(network, batch_size=1, share_contexts=share).score([request], attached, "scored")
            seen.append(scores)
        for one, other in zip(*seen, strict=True):
            limit = bound(network, 1) * float(other.abs().max())
            torch.testing.assert_close(one, other, rtol=0, atol=limit)
            k = kept_count(one.shape[-1], method.sparsity)
            flipped = select_top_k(one, k) != select_top_k(other, k)
            kth = other.topk(k).values[:, -1:].expand_as(other)
            assert bool(((other - kth).abs()[flipped] <= 2 * limit).all())


def test_settings_share_the_contexts(network):
    plan = Plan(choices(longest=60))
    scorer = Scorer(network, batch_size=4)
    lengths = []
    handle = network.register_forward_pre_hook(
        lambda _, args, kw: lengths.append(kw["input_ids"].numel()), with_kwargs=True
    )
    try:
        first = scorer.score(plan, None, "scored")
        n_first = sum(lengths)
        again = scorer.score(plan, None, "scored")
    finally:
        handle.remove()
    assert again == first
    assert sum(lengths) - n_first < n_first / 2


def test_a_small_budget_cuts_the_plan_and_keeps_what_fits():
    model = tiny_model("llama")
    asked = choices(n_documents=12)
    expected = Scorer(model, batch_size=4).score(asked, None, "scored")
    scorer, plan = Scorer(model, batch_size=4), Plan(asked)
    scorer._budget = 40
    for _ in range(2):
        found = scorer.score(plan, None, "scored")
        for one, other in zip(found, expected, strict=True):
            assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=bound(model, one.n_scored))
    assert plan.segments is not None
    kept = [segment.states is not None for segment in plan.segments]
    assert 1 < sum(kept) < len(kept)
    assert sum(s.n_tokens for s, k in zip(plan.segments, kept, strict=True) if k) <= 40
    other_plan = Plan(choices(seed=5))
    scorer.score(other_plan, None, "scored")  # another task takes the place
    assert sum(segment.states is not None for segment in plan.segments) < sum(kept)


def test_rotary_angles_that_change_with_the_length_are_not_shared():
    config = tiny_model("phi3").config.to_dict()
    half = [1.0] * 4
    config |= {
        "rope_parameters": {"rope_type": "longrope", "short_factor": half, "long_factor": half, "rope_theta": 1e4},
        "original_max_position_embeddings": 64,
    }
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["phi3"](**config)).eval()
    assert not can_share_contexts(model)
    assert not Scorer(model, batch_size=2).shares


def test_segments_hold_every_request_once_within_the_limits():
    asked = choices(n_documents=30, seed=3)
    segments = make_segments(asked, max_segment=40, max_tokens=12, max_columns=60)
    members = [i for segment in segments for batch in segment.batches for i in batch]
    assert sorted(members) == list(range(len(asked)))
    for segment in segments:
        assert segment.n_tokens <= 40
        assert len(set(segment.contexts)) == len(segment.contexts)
        for batch in segment.batches:
            width, deepest = (
                max(f(asked[i]) for i in batch) for f in (lambda r: len(r.targets), lambda r: r.n_context)
            )
            assert len(batch) == 1 or len(batch) * width <= 12
            assert len(batch) == 1 or len(batch) * (width + deepest) <= 60
