"""Methods on the inputs of projections, and ones that rank by the prompt, through fit, evaluation and the rows of a run."""

import json

import pytest
import torch

from suite import fit
from suite.evaluation.engine import Scorer
from suite.evaluation.evaluator import Evaluator
from suite.evaluation.plan import Request
from suite.evaluation.tasks import resolve_task
from suite.fitting.calibration import Calibration
from suite.modeling.attach import attach
from suite.runs.work.accuracy import _layer
from suite.schema import SPARSITY
from tests.modeling.site_methods import Griffin, Teal


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "prose.jsonl"
    rows = [f"{n} small boats left the harbour at dawn; rain fell on roof {n * n} all night." for n in range(40)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def perplexity(text):
    return resolve_task("decode_perplexity", limit=4, options={"text": str(text), "field": "text"})


@pytest.mark.parametrize("mode", ["ideal", "practical"])
def test_a_method_on_inputs_is_fitted_evaluated_and_has_rows(tiny, text, mode):
    method = Teal(sparsity=0.5)
    state = fit(tiny, method, Calibration(f"file:{text}", 1024)) if mode == "practical" else None
    evaluator = Evaluator(tiny)
    result, layers = evaluator.run(perplexity(text), method, mode=mode, state=state)
    values = {metric.name: metric.value for metric in result.metrics}
    assert values["kl_dense"] > 0.01
    rows = [_layer(layer) for layer in layers]
    assert [(row["layer"], row["site"]) for row in rows] == [
        (layer, site) for layer in range(2) for site in ("mlp.input", "mlp.neurons")
    ]
    assert {*rows[0], "cell_id", "sparsity_target"} == set(SPARSITY.names)
    assert [row["sparsity_realized"] for row in rows] == pytest.approx([0.5] * 4, abs=0 if mode == "ideal" else 0.05)
    assert [row["threshold"] is None for row in rows] == [mode == "ideal"] * 4
    whole = {metric.name: metric.value for metric in evaluator.run(perplexity(text), Teal(), mode="ideal")[0].metrics}
    assert whole["kl_dense"] == pytest.approx(0, abs=1e-6)


def test_a_method_that_ranks_by_the_prompt_gets_it_though_contexts_are_shared(tiny):
    """Continuations of two contexts, batched or alone, where contexts' states are shared or not, have one score."""
    generator = torch.Generator().manual_seed(4)
    requests = []
    for document in range(2):
        context = torch.randint(1, 260, (20 + document,), generator=generator).tolist()
        for n in (3, 5, 8):
            end = torch.randint(1, 260, (n,), generator=generator).tolist()
            requests.append(Request(tuple(context + end), tuple(end), document))
    found = []
    for options in ({"batch_size": 1}, {"batch_size": 4}, {"batch_size": 4, "share_contexts": False}):
        with attach(tiny.model, Griffin(sparsity=0.6), scope="scored") as attached:
            scores = Scorer(tiny.model, **options).score(requests, attached, "scored")
        found.append([score.loglikelihood for score in scores])
        assert attached.realised == pytest.approx(52 / 88)
    assert found[1] == pytest.approx(found[0], abs=1e-3)
    assert found[2] == found[1]
