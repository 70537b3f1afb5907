"""decode_perplexity: windows, scope and sums against a direct computation."""

import json
import math

import numpy as np
import pytest
import torch

from suite import evaluate, get_method
from suite.errors import InputError
from suite.evaluation.evaluator import Evaluator
from suite.evaluation.perplexity import windows
from suite.evaluation.tasks import resolve_task


def test_windows_cover_the_second_half_of_every_piece():
    made = list(windows(list(range(100, 123)), prefix=[], window=10, split=0.5, document=3))
    assert [len(r.tokens) for r in made] == [9, 9]  # the rest of 3 tokens is too short
    assert [r.offset for r in made] == [0, 10]
    assert made[0].targets == tuple(range(105, 110))
    assert made[0].first_sparse("scored") == 4  # the last of the dense first half
    assert {r.document for r in made} == {3}


def test_every_window_gets_the_prefix_and_stays_within_its_size():
    made = list(windows(list(range(20)), prefix=[99], window=8, split=0.25, document=0))
    assert all(r.tokens[0] == 99 and len(r.tokens) + 1 <= 8 for r in made)
    assert [r.offset for r in made] == [0, 7, 14]
    assert [len(r.targets) for r in made] == [6, 6, 6]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "prose.jsonl"
    rows = ["A small boat left the harbour at dawn.", "Rain fell on the tin roof all night long, and nobody slept."]
    path.write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    return path


def spec(text, **options):
    return resolve_task("decode_perplexity", options={"text": str(text), "field": "body", **options})


def test_dense_perplexity_equals_a_direct_sum(tiny, text):
    result, _ = Evaluator(tiny).run(spec(text), get_method("dense"), mode="none")
    total = count = 0
    for line in text.read_text().splitlines():
        ids = tiny.tokenizer.encode(json.loads(line)["body"], add_special_tokens=False)
        half = len(ids) // 2
        with torch.inference_mode():
            log_probs = torch.log_softmax(tiny.model(torch.tensor([ids])).logits[0].double(), -1)
        total -= sum(float(log_probs[i - 1, ids[i]]) for i in range(half, len(ids)))
        count += len(ids) - half
    values = {m.name: m.value for m in result.metrics}
    assert values["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert values["kl_dense"] == pytest.approx(0, abs=1e-6)
    assert values["top1_agreement"] == 1
    assert {m.name: m.higher_is_better for m in result.metrics} == {
        "perplexity": False,
        "kl_dense": False,
        "top1_agreement": True,
    }
    assert result.n_samples == 2


def test_more_sparsity_moves_further_from_dense(tiny, text):
    evaluator = Evaluator(tiny)
    kl = []
    for sparsity in (0.0, 0.3, 0.9):
        result, layers = evaluator.run(spec(text), get_method("d-countdown", sparsity=sparsity), mode="ideal")
        kl.append({m.name: m.value for m in result.metrics}["kl_dense"])
        assert layers[0].sparsity_realized == pytest.approx(math.floor(sparsity * 88) / 88)
        assert result.sparse_share == 1
    assert kl == sorted(kl)
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[2] > 10 * max(kl[0], np.finfo(np.float32).eps)


def test_window_option_and_scope_reach_the_scorer(tiny, text):
    result, layers = Evaluator(tiny).run(
        spec(text, window=16, split=0.75), get_method("cats", sparsity=0.5), mode="ideal", scope="paper"
    )
    assert 0 < result.sparse_share < 1
    scored = sum(v for _, m, v in result.samples if m == "perplexity.weight")
    assert layers[0].n_tokens == round(result.sparse_share * scored)


def test_default_text_is_the_pack(tiny):
    result = evaluate(tiny, ["decode_perplexity"], get_method("dense"), limit=3)["decode_perplexity"]
    assert result.n_samples == 3


def test_a_missing_field_names_what_is_there(tiny, text):
    bad = resolve_task("decode_perplexity", options={"text": str(text), "field": "page"})
    with pytest.raises(InputError, match="no text in field 'page'; it has body"):
        Evaluator(tiny).run(bad, get_method("dense"), mode="none")


def test_a_text_of_short_lines_is_refused(tiny, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("ab\n\ncd\n")
    with pytest.raises(InputError, match="no document of at least"):
        Evaluator(tiny).run(
            resolve_task("decode_perplexity", options={"text": str(path)}), get_method("dense"), mode="none"
        )


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True])
def test_a_batch_size_is_a_whole_number(tiny, batch_size):
    with pytest.raises(InputError, match=r"batch_size .*: must be a whole number"):
        evaluate(tiny, ["decode_perplexity"], get_method("dense"), limit=2, batch_size=batch_size)


def test_a_null_in_a_data_folder_is_refused_before_it_is_scored(tiny, tmp_path):
    (tmp_path / "piqa").mkdir()
    rows = [{"goal": goal, "sol1": "lift", "sol2": "wait", "label": 0} for goal in ("Open", None)]
    (tmp_path / "piqa" / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=r"validation\.jsonl line 2: key 'goal' is null"):
        evaluate(tiny, ["piqa"], get_method("dense"), data_dir=tmp_path)
