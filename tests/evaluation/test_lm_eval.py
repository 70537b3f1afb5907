"""The wiring to lm-eval: equal to lm-eval's own Hugging Face model, and its tasks under every scope."""

import copy
import dataclasses
import json

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from suite import evaluate, get_method
from suite.errors import CellError, InputError
from suite.evaluation.built_task import sample_indices
from suite.evaluation.engine import Scorer
from suite.evaluation.evaluator import Evaluator
from suite.evaluation.lm_eval import SuiteLM
from suite.evaluation.tasks import PACK_DIR, resolve_task
from suite.runs.estimate import _shots
from suite.statistics import statistic
from tests.evaluation.conftest import choices_task

DENSE = get_method("dense")


@pytest.fixture(scope="module")
def evaluator(tiny):
    return Evaluator(tiny, batch_size=4, seed=1)


def upstream(tiny, task, documents, batch_size):
    """The same documents through lm-eval's own model and evaluator."""
    lm = HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer, batch_size=batch_size)
    manager = TaskManager(include_path=str(PACK_DIR), include_defaults=False)
    return lm_eval.simple_evaluate(
        lm, tasks=[task], task_manager=manager, samples={task: documents}, bootstrap_iters=0, log_samples=True
    )


@pytest.mark.parametrize("batch_size", [1, 4])
def test_dense_loglikelihoods_equal_lm_eval(tiny, batch_size):
    """Ours runs the context apart and sums in fp64, so products have other shapes: eps * |sum| * sqrt(width)."""
    evaluator = Evaluator(tiny, batch_size=batch_size, seed=1)
    spec = resolve_task("pack_grammar", limit=8)
    result, layers = evaluator.run(spec, DENSE, mode="none")
    built = evaluator._build(spec)
    theirs = upstream(tiny, "pack_grammar", built.documents, batch_size)
    ours = [instance.resps[0] for instance in built.task.instances]
    expected = [tuple(r[0]) for sample in theirs["samples"]["pack_grammar"] for r in sample["resps"]]
    scale = np.finfo(np.float32).eps * np.sqrt(tiny.model.config.hidden_size) * 100
    np.testing.assert_allclose([o[0] for o in ours], [e[0] for e in expected], rtol=scale)
    assert [o[1] for o in ours] == [e[1] for e in expected]
    assert result.metrics[0].value == theirs["results"]["pack_grammar"]["acc,none"]
    assert layers == []
    assert result.sparse_share == 0


@pytest.mark.parametrize("batch_size", [1, 4])
def test_equal_batches_equal_lm_eval_bit_for_bit(tiny, batch_size):
    """Hidden states of whole requests in lm-eval's batches; its head works on all positions, ours on the scored ones."""
    evaluator = Evaluator(tiny, batch_size=batch_size, seed=1)
    built = evaluator._build(resolve_task("pack_grammar", limit=8))
    evaluator.run(resolve_task("pack_grammar", limit=8), DENSE, mode="none")
    requests = evaluator.lm.plans["loglikelihood"].requests
    ours = Scorer(tiny.model, batch_size=batch_size, share_contexts=False).dense_hidden(requests)
    seen = []
    ids = tiny.model.register_forward_pre_hook(lambda _, args: seen.append([args[0]]))
    hidden = tiny.model.lm_head.register_forward_pre_hook(lambda _, args: seen[-1].append(args[0]))
    try:
        upstream(tiny, "pack_grammar", built.documents, batch_size)
    finally:
        ids.remove()
        hidden.remove()
    rows = [(row, states) for tokens, batch in seen for row, states in zip(tokens.tolist(), batch, strict=True)]
    assert max(len(batch) for _, batch in seen) == batch_size
    for request, mine in zip(requests, ours, strict=True):
        end = len(request.tokens)
        theirs = [states[request.n_context : end] for row, states in rows if tuple(row[:end]) == request.tokens]
        assert any(torch.equal(mine, one) for one in theirs)


@pytest.mark.parametrize("task", ["pack_knowledge", "pack_last_word", "pack_generation"])
def test_dense_metrics_equal_lm_eval(tiny, evaluator, task):
    spec = resolve_task(task, limit=4)
    result, _ = evaluator.run(spec, DENSE, mode="none")
    theirs = upstream(tiny, task, evaluator._build(spec).documents, 4)["results"][task]
    for metric in result.metrics:
        assert metric.value == pytest.approx(theirs[f"{metric.name},{metric.filter}"], rel=1e-4)


@pytest.mark.parametrize("window", [None, 48])
def test_rolling_perplexity_equals_lm_eval_and_samples_rebuild_it(tiny, tmp_path, window):
    texts = [" ".join(f"{word}{number}" for number in range(40)) for word in ("abc", "x y z")]  # no two windows alike
    (tmp_path / "rolling.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "rolling.yaml").write_text(
        f"task: rolling\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rolling.jsonl}}}}\n"
        "output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\nmetadata: {version: 3}\n"
    )
    lm = HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer, batch_size=2, max_length=window)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = lm_eval.simple_evaluate(lm, tasks=["rolling"], task_manager=manager, bootstrap_iters=0)
    spec = resolve_task("rolling", include_path=tmp_path)
    spec = dataclasses.replace(spec, options={} if window is None else {"window": window})
    evaluator = Evaluator(tiny, batch_size=2)
    result, _ = evaluator.run(spec, DENSE, mode="none")
    assert result.task_version == "3"
    for metric in result.metrics:
        assert metric.value == pytest.approx(theirs["results"]["rolling"][f"{metric.name},none"], rel=1e-5)
        values = [v for _, m, v in result.samples if m == metric.name]
        weights = [v for _, m, v in result.samples if m == metric.name + ".weight"]
        assert statistic(values, weights, metric.name) == metric.value
    (plan,) = evaluator._build(spec).plans.values()
    longest = max(len(request.tokens) for request in plan.requests)
    assert longest == window if window else longest > 48
    sparse, _ = evaluator.run(spec, get_method("cats", sparsity=0.5), mode="ideal", scope="paper")
    assert sparse.sparse_share == 1  # rolling perplexity always runs with every position in scope


def test_first_answer_token_is_dense_only_under_scope_paper(evaluator):
    spec = resolve_task("pack_last_word", limit=6)
    method = get_method("m-countdown", sparsity=0.7)
    shares = {s: evaluator.run(spec, method, mode="ideal", scope=s)[0].sparse_share for s in ("paper", "scored", "all")}
    assert shares["scored"] == shares["all"] == 1
    assert shares["paper"] < 1


def test_generation_counts_prefill_and_decode_by_scope(evaluator):
    spec = resolve_task("pack_generation", limit=4)
    method = get_method("d-countdown", sparsity=0.5)
    tokens = {}
    for scope in ("paper", "scored", "all"):
        result, layers = evaluator.run(spec, method, mode="ideal", scope=scope)
        tokens[scope] = layers[0].n_tokens
        assert (result.sparse_share == 1) is (scope != "paper")
        assert layers[0].sparsity_realized == pytest.approx(0.5, abs=1e-9)
    assert tokens["paper"] < tokens["scored"] < tokens["all"]


def test_random_generates_the_same_whatever_the_batch(tiny):
    spec = resolve_task("pack_generation", limit=5)
    method = get_method("random", sparsity=0.3)
    texts = []
    for batch_size in (1, 5):
        evaluator = Evaluator(tiny, batch_size=batch_size, seed=1)
        evaluator.run(spec, method, mode="ideal", scope="scored")
        texts.append([i.resps[0] for i in evaluator._build(spec).task.instances])
    assert texts[0] == texts[1]


def test_settings_do_not_leak_into_each_other(evaluator):
    spec = resolve_task("pack_grammar", limit=6)
    before = evaluator.run(spec, DENSE, mode="none")[0]
    evaluator.run(spec, get_method("random", sparsity=0.9), mode="ideal")
    assert evaluator.run(spec, DENSE, mode="none")[0] == before


def test_samples_name_document_and_template(evaluator):
    result, _ = evaluator.run(resolve_task("pack_grammar", limit=6), DENSE, mode="none")
    rows = [json.loads(line) for line in (PACK_DIR / "grammar.jsonl").read_text().splitlines()]
    assert len(result.samples) == result.n_samples == 6
    for doc_id, metric, value in result.samples:
        template, _, index = doc_id.rpartition("/")
        assert rows[int(index)]["template"] == template
        assert (metric, value in (0.0, 1.0)) == ("acc", True)


def test_chance_is_one_over_the_number_of_choices(evaluator):
    chances = {
        task: {m.name: m.chance for m in evaluator.run(resolve_task(task, limit=2), DENSE, mode="none")[0].metrics}
        for task in ("pack_grammar", "pack_knowledge", "pack_last_word", "pack_generation")
    }
    assert chances["pack_grammar"] == {"acc": 0.5}
    assert chances["pack_knowledge"] == {"acc": 0.25, "acc_norm": 0.25}
    assert chances["pack_last_word"] == {"acc": 0.0, "perplexity": None}
    assert chances["pack_generation"] == {"exact_match": 0.0}


def test_local_data_feeds_the_builtin_task(tiny, tmp_path):
    (tmp_path / "piqa").mkdir()
    row = {"goal": "open a jar", "sol1": "twist the lid", "sol2": "sing to it", "label": 0}
    (tmp_path / "piqa" / "validation.jsonl").write_text(
        "".join(json.dumps(row | {"label": i % 2}) + "\n" for i in range(4))
    )
    result = evaluate(tiny, ["piqa"], DENSE, data_dir=tmp_path)["piqa"]
    assert {m.name: m.value for m in result.metrics} == {"acc": 0.5, "acc_norm": 0.5}  # one prompt, both labels
    assert {m.chance for m in result.metrics} == {0.5}


def test_samples_of_a_task_with_several_filters_are_told_apart(tiny, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "1 + 1 =", "a": "2"}) + "\n")
    (tmp_path / "two.yaml").write_text(
        f"task: two\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "output_type: generate_until\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs: {until: ['x'], max_gen_toks: 3}\nmetric_list: [{metric: exact_match}]\n"
        "filter_list:\n  - {name: first, filter: [{function: take_first}]}\n"
        "  - {name: digits, filter: [{function: regex, regex_pattern: '([0-9])'}, {function: take_first}]}\n"
    )
    result = evaluate(tiny, ["two"], DENSE, include_path=tmp_path)["two"]
    assert sorted(m.filter for m in result.metrics) == ["digits", "first"]
    assert sorted(metric for _, metric, _ in result.samples) == ["exact_match,digits", "exact_match,first"]


def test_hub_task_offline_is_one_line(tiny):
    with pytest.raises(InputError, match=r"piqa cannot be loaded \(hub\)") as error:
        evaluate(tiny, ["piqa"], DENSE)
    assert "\n" not in str(error.value)


def test_an_unknown_scope_is_refused(evaluator):
    with pytest.raises(InputError, match="scope 'score'"):
        evaluator.run(resolve_task("pack_grammar", limit=1), DENSE, mode="none", scope="score")


def test_limit_takes_the_first_of_a_seeded_shuffle():
    assert sample_indices(5, None, 0) == sample_indices(5, 9, 0) == [0, 1, 2, 3, 4]
    ten, twenty = sample_indices(100, 10, 3), sample_indices(100, 20, 3)
    assert set(ten) < set(twenty)
    assert ten == sorted(ten) != sample_indices(100, 10, 4)


@pytest.fixture
def merging(tiny):
    """The tiny model with a tokenizer that has "answer" and "ans" as one token each."""
    vocabulary = tiny.tokenizer.get_vocab()
    symbols = ["an", "ans", "answ", "answe", "answer"]
    vocabulary |= {symbol: number for number, symbol in enumerate(symbols, len(vocabulary))}
    merges = [("a", "n"), ("an", "s"), ("ans", "w"), ("answ", "e"), ("answe", "r")]
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = {"eos_token": "<end>", "bos_token": "<end>", "pad_token": "<end>"}
    return dataclasses.replace(tiny, tokenizer=PreTrainedTokenizerFast(tokenizer_object=fast, **special))


def test_a_choice_that_merges_into_the_context_is_named_and_not_scored(merging, tmp_path):
    row = {"q": "Please write down your ans", "choices": ["kle", "wer", "tique"], "gold": 1}
    folder = choices_task(tmp_path, [row], target_delimiter="")
    with pytest.raises(CellError, match=r"document 0: choice 1 'wer' has no token of its own"):
        evaluate(merging, ["own"], DENSE, include_path=folder)


def test_an_empty_choice_without_context_is_named_too(tiny, tmp_path):
    rows = [{"q": "", "choices": ["a", last], "gold": 0} for last in ("b", "")]
    folder = choices_task(tmp_path, rows, target_delimiter="")
    with pytest.raises(CellError, match="document 1: choice 1 '' has no token"):
        evaluate(tiny, ["own"], DENSE, include_path=folder)


def test_bos_is_context_and_never_a_target_of_rolling_windows(tiny, tmp_path):
    """lm-eval scores it in the first window, where the tokenizer adds one."""
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", tokenizer.bos_token_id)]
    )
    with_bos = dataclasses.replace(tiny, tokenizer=tokenizer)
    text = " ".join(f"abc{number}" for number in range(20))  # one window: theirs begins BOS BOS, ours BOS
    lm = SuiteLM(with_bos, 2)
    lm.bind(None, "all", [0], {})
    (ours,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0, ("own", 0, 1))])
    targets = [target for request in lm.plans["loglikelihood_rolling"].requests for target in request.targets]
    assert targets == tokenizer.encode(text, add_special_tokens=False)
    theirs = HFLM(pretrained=tiny.model, tokenizer=tokenizer, batch_size=2)
    (total,) = theirs.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0, ("own", 0, 1))])
    with torch.inference_mode():
        ids = torch.tensor([[0, *targets]])
        by_hand = tiny.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
    assert ours == pytest.approx(float(by_hand), rel=1e-5)
    assert abs(ours - total) > 0.1


def generating_task(folder, kwargs, rows=5, **settings):
    """An own task that generates after ``rows`` questions; returns its folder."""
    return choices_task(
        folder,
        [{"q": f"{number} + {number} =", "a": str(2 * number)} for number in range(rows)],
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target="{{a}}",
        generation_kwargs={"until": ["zz"], "max_gen_toks": 6} | kwargs,
        metric_list=[{"metric": "exact_match"}],
        **settings,
    )


def test_sampled_answers_follow_from_the_seed_alone(tiny, tmp_path):
    spec = resolve_task(
        "own", include_path=generating_task(tmp_path, {"do_sample": True, "temperature": 1.0}, repeats=2)
    )

    def answers(seed, batch_size, before=0):
        torch.rand(before)
        evaluator = Evaluator(tiny, batch_size=batch_size, seed=seed)
        evaluator.run(spec, DENSE, mode="none")
        return [instance.resps for instance in evaluator._build(spec).task.instances]

    first = answers(0, 4)
    assert answers(0, 4, before=3) == answers(0, 1) == first
    assert answers(1, 4) != first
    assert all(one != two for one, two in first)  # repeats of a document are draws of their own
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    one = torch.rand(1)
    answers(0, 4)
    assert torch.equal(torch.cat([one, torch.rand(1)]), expected)  # the caller's stream goes on


@pytest.mark.parametrize("option", ["num_beams", "num_return_sequences"])
def test_beams_are_refused_by_name(tiny, tmp_path, option):
    folder = generating_task(tmp_path, {option: 2})
    with pytest.raises(CellError, match=f"{option} 2: must be 1"):
        evaluate(tiny, ["own"], DENSE, include_path=folder)


def arc_folder(folder, n_test, n_train=0):
    """A data folder with n documents of arc_easy."""
    (folder / "arc_easy").mkdir()
    for split, n in (("test", n_test), ("train", n_train)):
        rows = [
            {"question": f"{split} {i}?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
            for i in range(n)
        ]
        if rows:
            (folder / "arc_easy" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(("n_train", "split"), [(0, "test (scored)"), (5, "train")])
def test_examples_are_never_the_document_and_their_split_is_said(tiny, tmp_path, n_train, split):
    spec = resolve_task("arc_easy", data_dir=arc_folder(tmp_path, 6, n_train), num_fewshot=3)
    evaluator = Evaluator(tiny, batch_size=4)
    result, _ = evaluator.run(spec, DENSE, mode="none")
    assert result.fewshot_split == split
    prompts = {instance.args[0] for instance in evaluator._build(spec).task.instances}
    assert len(prompts) == 6
    for prompt in prompts:
        questions = [line for line in prompt.splitlines() if line.startswith("Question")]
        assert len(set(questions)) == 4
        assert all(split.split()[0] in question for question in questions[:-1])


def test_more_examples_than_documents_is_one_line(tiny, tmp_path):
    spec = resolve_task("arc_easy", data_dir=arc_folder(tmp_path, 3), num_fewshot=3)
    with pytest.raises(InputError, match=r"num_fewshot 3 is more than the 2 examples of split test"):
        Evaluator(tiny).run(spec, DENSE, mode="none")


@pytest.mark.parametrize(
    ("n_train", "line"), [(0, "from test (scored; the document itself is left out)"), (2, "from train")]
)
def test_check_says_where_examples_come_from(tmp_path, n_train, line):
    spec = resolve_task("arc_easy", data_dir=arc_folder(tmp_path, 3, n_train), num_fewshot=1)
    assert _shots(spec) == f", 1 examples {line}"
    assert _shots(dataclasses.replace(spec, num_fewshot=None)) == ""


def test_a_data_folder_is_offered_only_where_it_helps(tiny, tmp_path):
    broken = choices_task(tmp_path, [{"q": "a", "choices": ["b"], "gold": 0}], test_split="nowhere")
    with pytest.raises(InputError, match="own cannot be loaded") as error:
        evaluate(tiny, ["own"], DENSE, include_path=broken)
    assert "offline" not in str(error.value)


def test_a_wrong_answer_key_is_one_line_with_its_document(tiny, tmp_path):
    path = arc_folder(tmp_path, 4) / "arc_easy" / "test.jsonl"
    rows = path.read_text().splitlines()
    rows[2] = rows[2].replace('"answerKey": "A"', '"answerKey": "E"')
    path.write_text("\n".join(rows))
    with pytest.raises(InputError, match="arc_easy document 2: 'E' is not in list"):
        evaluate(tiny, ["arc_easy"], DENSE, data_dir=tmp_path)
