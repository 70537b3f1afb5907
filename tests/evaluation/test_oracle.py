"""Every shape of task has the values, errors and samples that lm-eval's own evaluator gets from its own model."""

from __future__ import annotations

import json

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval import evaluator as upstream
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from suite import evaluate, get_method
from suite.evaluation.lm_eval import SuiteLM
from suite.modeling.loading import load_model
from suite.statistics import is_log_space
from tests.evaluation.oracle_tasks import SHAPES, WORDS, Shape, write

SEED = 3  # of the few-shot examples
DENSE = get_method("dense")


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs that join "ans" with what follows, and a BOS token before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<end>", "<start>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the answer answers an answer"] * 50 + [" ".join(WORDS)] * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A", pair="<start> $A $B", special_tokens=[("<start>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<start>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """A model with sliding windows shorter than its context."""
    folder = tmp_path_factory.mktemp("models") / "tiny-mistral"
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=304,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        sliding_window=48,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    merging_tokenizer().save_pretrained(folder)
    return load_model(str(folder))


@pytest.fixture
def theirs(monkeypatch):
    """lm-eval's results of a shape; without its look at the machine, which takes seconds, and its bootstrap."""
    monkeypatch.setattr(upstream, "add_env_info", lambda results: None)
    monkeypatch.setattr(upstream, "get_git_commit_hash", lambda: None)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")

    def run(loaded, folder, name, batch_size):
        # BOS is not a target here, where lm-eval scores it in the first window of a document
        rolling = SHAPES[name].config.get("output_type") == "loglikelihood_rolling"
        bos = {"add_bos_token": False} if rolling else {}
        lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, **bos)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        return lm_eval.simple_evaluate(
            lm, tasks=[name], task_manager=manager, bootstrap_iters=2, fewshot_random_seed=SEED
        )

    return run


def bound(loaded) -> float:
    """Relative: fp32 products of other shapes in every layer, |sum| of a few hundred terms over the result."""
    return float(np.finfo(np.float32).eps * np.sqrt(loaded.model.config.hidden_size) * 100)


@pytest.fixture
def answers(monkeypatch):
    """Answers of the suite's model to each request, by (task, document, index of the request)."""
    given = {}
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):

        def recorded(lm, requests, *args, kind=kind, original=getattr(SuiteLM, kind), **kwargs):
            found = original(lm, requests, *args, **kwargs)
            given.update({(r.task_name, r.doc_id, r.idx): answer for r, answer in zip(requests, found, strict=True)})
            return found

        monkeypatch.setattr(SuiteLM, kind, recorded)
    return given


def same_answers(answers, task, rows, rel: float) -> None:
    """Equal log-likelihoods, greedy flags and texts, request by request."""
    for row in rows:
        for i, repeats in enumerate(row["resps"]):
            ours, expected = answers[task, row["doc_id"], i], repeats[0]
            if isinstance(expected, tuple):
                assert ours[1] == expected[1]
                ours, expected = ours[0], expected[0]
            assert ours == (expected if isinstance(expected, str) else pytest.approx(expected, rel=rel))


def scores(result):
    return {(metric.name, metric.filter): metric for metric in result.metrics}


def same_metrics(result, expected, directions, shape: Shape, rel: float) -> None:
    """Equal names, values, directions, and standard errors where lm-eval has them in closed form."""
    ours = scores(result)
    numbers = {
        tuple(key.split(",", 1)): value
        for key, value in expected.items()
        if "," in key and not key.split(",")[0].endswith("_stderr") and not key.startswith("alias")
    }
    assert set(ours) == set(numbers)
    for (name, chain), value in numbers.items():
        metric = ours[name, chain]
        # the error of a log-likelihood is an error of the exponent
        slack = rel * (1 + abs(np.log(value))) if is_log_space(name) else rel
        assert metric.value == pytest.approx(value, rel=slack, abs=rel)
        if name in directions:
            assert metric.higher_is_better is directions[name]
        if name in shape.means:
            stderr = expected[f"{name}_stderr,{chain}"]
            assert metric.stderr == (None if stderr == "N/A" else pytest.approx(stderr, rel=rel, abs=rel))


def pairs(ours, expected):
    """Texts and numbers of two nested sequences of one form, side by side."""
    if isinstance(ours, list):
        return [pair for part, other in zip(ours, expected, strict=True) for pair in pairs(part, other)]
    return [(ours, expected)]


def same_samples(result, rows, rel: float) -> int:
    """Equal values of documents wherever both have a number; the count of what was compared."""
    several = len({row["filter"] for row in rows}) > 1
    ours = {(doc, metric): value for doc, metric, value in result.samples}
    compared = 0
    for row in rows:
        for name in row["metrics"]:
            value, label = row[name], f"{name},{row['filter']}" if several else name
            item = ours.get((str(row["doc_id"]), label))
            if isinstance(item, str):  # what an own aggregation works on, as JSON
                for part, other in pairs(json.loads(item), value):
                    assert part == (other if isinstance(other, str) else pytest.approx(other, rel=rel, abs=rel))
                compared += 1
                continue
            weight = ours.get((str(row["doc_id"]), label + ".weight"))
            if isinstance(value, tuple) and weight is not None:
                assert weight == value[1]
                value = value[0]
            if not isinstance(value, (int, float)):
                continue
            negated = is_log_space(name) or name == "bits_per_byte"
            assert ours[str(row["doc_id"]), label] == pytest.approx(-value if negated else value, rel=rel)
            compared += 1
    return compared


def leaves(members):
    """Tasks below a group, whatever groups lie between."""
    return {n: s for name, shape in members.items() for n, s in (leaves(shape.members) or {name: shape}).items()}


@pytest.mark.parametrize("architecture", ["tiny", "merging"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_task_of_every_shape_equals_lm_eval(request, tmp_path, theirs, answers, name, architecture):
    loaded, shape = request.getfixturevalue(architecture), SHAPES[name]
    write(tmp_path, name, shape)
    expected = theirs(loaded, tmp_path, name, shape.batch_size)
    results = evaluate(loaded, [name], DENSE, include_path=tmp_path, batch_size=shape.batch_size, seed=SEED)
    rel = bound(loaded)
    for task, part in leaves({name: shape}).items():
        same_answers(answers, task, expected["samples"][task], rel)
        same_metrics(results[task], expected["results"][task], expected["higher_is_better"][task], part, rel)
        compared = same_samples(results[task], expected["samples"][task], rel)
        assert compared >= len(part.test) * len(part.means)
    if shape.members:
        same_metrics(results[name], expected["groups"][name], {}, shape, rel)
