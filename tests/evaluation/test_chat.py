"""Chat template, system instruction and few-shot turns: the prompts and values of lm-eval."""

import csv
import dataclasses

import lm_eval
import pytest
from lm_eval import evaluator as upstream
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from suite import evaluate, get_method
from suite.config import build_config
from suite.errors import InputError
from suite.evaluation.chat import chat_options
from suite.evaluation.evaluator import Evaluator
from suite.evaluation.tasks import resolve_task
from suite.runs.cells.accuracy import expand
from suite.runs.cells.matrix import Matrix
from suite.runs.machine import LocalWorld
from suite.runs.view.assemble import Assembly
from suite.runs.view.scrub import Scrubber
from tests.evaluation.conftest import byte_tokenizer
from tests.evaluation.oracle_tasks import ANSWERS, ITEMS, SHOTS, Shape, answering, choosing, write

DENSE = get_method("dense")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
)
CHATS = [
    {"apply_chat_template": True},
    {"apply_chat_template": True, "fewshot_as_multiturn": False, "system_instruction": "Be brief."},
    {"apply_chat_template": True, "system_instruction": "Be brief."},
    {"system_instruction": "Be brief."},
]


@pytest.fixture
def chatty(tiny):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return dataclasses.replace(tiny, tokenizer=tokenizer)


@pytest.fixture
def folder(tmp_path):
    shots = {"num_fewshot": 2, "fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}
    write(tmp_path, "choose", Shape(choosing("acc", "acc_norm", **shots), ITEMS[:3], train=SHOTS))
    write(tmp_path, "answer", Shape(answering("exact_match"), ANSWERS[:3]))
    return tmp_path


@pytest.mark.parametrize(("task", "chat"), [*(("choose", chat) for chat in CHATS), ("answer", CHATS[2])])
def test_prompts_and_values_equal_lm_eval(chatty, folder, monkeypatch, chat, task):
    monkeypatch.setattr(upstream, "add_env_info", lambda results: None)
    monkeypatch.setattr(upstream, "get_git_commit_hash", lambda: None)
    lm = HFLM(pretrained=chatty.model, tokenizer=chatty.tokenizer, batch_size=4)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    multiturn = chat.get("fewshot_as_multiturn", chat.get("apply_chat_template", False))
    theirs = lm_eval.simple_evaluate(
        lm, tasks=[task], task_manager=manager, bootstrap_iters=0, **{**chat, "fewshot_as_multiturn": multiturn}
    )
    evaluator = Evaluator(chatty, batch_size=4)
    spec = resolve_task(task, include_path=folder, chat=chat_options(task, **chat))
    evaluator.run(spec, DENSE, mode="none")
    ours = [instance.args for instance in evaluator._build(spec).task.instances]
    expected = [tuple(arguments) for sample in theirs["samples"][task] for arguments in sample["arguments"]]
    assert [prompt for prompt, _ in ours] == [prompt for prompt, _ in expected]
    assert all("Be brief." in prompt for prompt, _ in ours) is ("system_instruction" in chat)
    if task == "choose":
        assert [answer for _, answer in ours] == [answer for _, answer in expected]
    result = evaluate(chatty, [task], DENSE, include_path=folder, batch_size=4, **chat)[task]
    for metric in result.metrics:
        assert metric.value == theirs["results"][task][f"{metric.name},{metric.filter}"]


def test_a_model_without_a_template_is_refused(tiny, folder):
    with pytest.raises(InputError, match=r"has no chat template: use its instruct version"):
        evaluate(tiny, ["answer"], DENSE, include_path=folder, apply_chat_template=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fewshot_as_multiturn": True}, "fewshot_as_multiturn of task answer: needs apply_chat_template"),
        ({"apply_chat_template": "default"}, "apply_chat_template 'default' of task answer: must be true or false"),
        ({"system_instruction": 5}, "system_instruction 5 of task answer: must be a text"),
    ],
)
def test_options_that_make_no_sense_are_one_line(tiny, folder, options, message):
    with pytest.raises(InputError, match=message):
        evaluate(tiny, ["answer"], DENSE, include_path=folder, **options)


def cells(folder, *tasks):
    block = {"methods": ["dense"], "sparsities": [0.5], "tasks": list(tasks)}
    config = {"name": "chat", "models": [{"id": "embedded"}], "include_path": str(folder), "accuracy": [block]}
    world = LocalWorld(build_config(config, "test"))
    world.weights = lambda spec: "weights"
    return expand(world.config, world)


def test_a_key_has_the_options_that_are_set_and_no_other(folder):
    chat = {"name": "answer", "apply_chat_template": True}
    system = {**chat, "system_instruction": "Be brief."}
    plain, template, both = cells(folder, "answer", chat, system)
    assert len({plain.key, template.key, both.key}) == 3
    assert "chat" not in plain.key_fields["task"]
    assert both.key_fields["task"]["chat"] == {
        "apply_chat_template": True,
        "fewshot_as_multiturn": True,
        "system_instruction": "Be brief.",
    }
    (refused,) = cells(folder, {"name": "decode_perplexity", "apply_chat_template": True})
    assert "accuracy.0.tasks: task decode_perplexity scores a text as it is" in refused.problem


def test_rows_say_which_options_the_task_was_given(folder):
    found = cells(folder, "answer", {"name": "answer", "apply_chat_template": True, "system_instruction": "Be brief."})
    assembly = Assembly("run", Matrix(found, []), dict.fromkeys(cell.key for cell in found), Scrubber([]))
    rows = list(csv.DictReader(assembly.files()["accuracy.csv"].decode().splitlines()))
    chat = '{"apply_chat_template":true,"fewshot_as_multiturn":true,"system_instruction":"Be brief."}'
    assert {row["cell_id"]: row["chat"] for row in rows} == {found[0].id: "", found[1].id: chat}
