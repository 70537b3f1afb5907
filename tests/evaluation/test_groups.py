"""Groups, tags and patterns of lm-eval as task names."""

import shutil
import subprocess
import sys

import pytest
import yaml

from suite import evaluate, get_method
from suite.config import build_config
from suite.errors import InputError
from suite.evaluation import groups, tasks
from suite.evaluation.groups import expand_name
from suite.runs.cells.accuracy import expand
from suite.runs.machine import LocalWorld
from tests.evaluation.oracle_tasks import ITEMS, Shape, choosing, write


@pytest.fixture
def folder(tmp_path):
    """Two own tasks, a tag on one of them, and a group of the tag and the other."""
    write(tmp_path, "own_a", Shape(choosing("acc", tag="own_tag"), ITEMS[:2]))
    write(tmp_path, "own_b", Shape(choosing("acc"), ITEMS[2:5]))
    return group(tmp_path, "both", ["own_tag", {"task": "own_b", "num_fewshot": 0, "task_alias": "b"}])


def group(folder, name, members, **settings):
    text = yaml.safe_dump({"group": name, "task": members, **settings})
    (folder / f"{name}.yaml").write_text(text)
    return folder


def names(name, folder=None):
    return [leaf.name for leaf in expand_name(name, folder).tasks]


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Two folders of lm-eval's own: the index of all takes some seconds."""
    for family in ("mmlu", "arc"):
        shutil.copytree(tasks.lm_eval_tasks_dir() / family, tmp_path / family)
    caches = (tasks._builtin_files, groups._builtin_index)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(tasks, "lm_eval_tasks_dir", lambda: tmp_path)
    monkeypatch.setattr(groups, "lm_eval_tasks_dir", lambda: tmp_path)
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("few")
def test_names_of_lm_eval_are_its_groups_tags_and_patterns():
    mmlu = expand_name("mmlu")
    assert len(mmlu.tasks) == 57
    assert [group.name for group in mmlu.groups][-1] == "mmlu"
    assert {group.name for group in mmlu.groups} == {
        *("mmlu", "mmlu_stem", "mmlu_other", "mmlu_humanities", "mmlu_social_sciences")
    }
    assert names("ai2_arc") == ["arc_challenge", "arc_easy"]
    assert expand_name("ai2_arc").groups == ()
    assert names("arc_e*") == ["arc_easy"]
    matched = names("mmlu_*")
    assert {leaf.name for leaf in mmlu.tasks} <= set(matched)
    assert len(matched) == len(set(matched))
    with pytest.raises(InputError, match=r"task pattern 'mmmlu_\?\?' matches no task"):
        expand_name("mmmlu_??")


def test_a_group_of_an_own_folder_needs_no_index_of_lm_eval_and_no_torch(folder):
    code = (
        "import sys; from suite.evaluation import groups; "
        f"found = groups.expand_name('both', {str(folder)!r}); "
        "assert [t.name for t in found.tasks] == ['own_a', 'own_b'], found; "
        "assert groups._builtin_index.cache_info().currsize == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_matrix_has_a_cell_for_every_task_of_a_group(folder):
    config = build_config(
        {
            "name": "groups",
            "models": [{"id": "embedded"}],
            "include_path": str(folder),
            "accuracy": [
                {"methods": ["dense"], "sparsities": [0.5], "tasks": ["own_a", {"name": "both", "limit": 1}, "both"]}
            ],
        },
        "test",
    )
    world = LocalWorld(config)
    world.weights = lambda spec: "weights"
    cells = expand(config, world)
    assert [(cell.task.name, cell.task.limit, cell.task.num_fewshot) for cell in cells] == [
        ("own_a", None, None),
        ("own_a", 1, None),
        ("own_b", 1, 0),
        ("own_b", None, 0),
    ]


def test_a_group_without_averages_has_its_tasks_alone(tiny, folder):
    assert set(evaluate(tiny, ["both", "own_b"], get_method("dense"), include_path=folder)) == {"own_a", "own_b"}


def test_a_task_with_two_numbers_of_examples_is_two_cells_and_no_one_result(tiny, folder, monkeypatch):
    group(folder, "shots", [{"task": "own_a", "num_fewshot": 1}, {"task": "own_b", "num_fewshot": 1}])
    group(folder, "twice", ["both", "shots"])
    leaves = [(leaf.name, leaf.num_fewshot) for leaf in expand_name("twice", folder).tasks]
    assert leaves == [("own_a", None), ("own_b", 0), ("own_a", 1), ("own_b", 1)]
    block = {"methods": ["dense"], "sparsities": [0.5], "tasks": ["twice"]}
    config = {"name": "g", "models": [{"id": "embedded"}], "include_path": str(folder), "accuracy": [block]}
    world = LocalWorld(build_config(config, "test"))
    world.weights = lambda spec: "weights"
    assert sorted((c.task.name, c.task.num_fewshot or 0) for c in expand(world.config, world)) == sorted(
        (name, n or 0) for name, n in leaves
    )

    def runs(*_, **__):
        raise AssertionError("a task was run before the names were looked through")

    monkeypatch.setattr("suite.evaluation.evaluator.Evaluator.run", runs)
    for names_ in (["twice"], ["both", "shots"], ["own_a", "both", "shots"]):
        with pytest.raises(InputError, match="task own_a is asked for with num_fewshot 0 and 1: evaluate them in two"):
            evaluate(tiny, names_, get_method("dense"), include_path=folder)


@pytest.mark.parametrize(
    ("members", "settings", "message"),
    [
        (["own_a", "own_c"], {}, "group odd: member 'own_c' is not a task, group or tag"),
        ([{"task": "own_a", "doc_to_text": "x"}], {}, "group odd: gives task own_a another doc_to_text"),
        (["own_a"], {"output_type": "generate_until"}, "group odd: gives task own_a another output_type"),
        (["odd"], {}, r"group odd: contains itself \(odd > odd\)"),
        ([5], {}, "group odd: member 5 is not the name"),
        (
            ["own_a"],
            {"aggregate_metric_list": [{"metric": "acc", "aggregation": "max"}]},
            "group odd: aggregate_metric",
        ),
    ],
)
def test_a_group_that_cannot_be_run_is_one_line(folder, members, settings, message):
    with pytest.raises(InputError, match=message):
        expand_name("odd", group(folder, "odd", members, **settings))


def test_a_broken_group_fails_alone_in_a_matrix(folder):
    group(folder, "odd", ["own_c"])
    block = {"methods": ["dense"], "sparsities": [0.5], "tasks": ["odd", "own_a"]}
    config = {"name": "g", "models": [{"id": "embedded"}], "include_path": str(folder), "accuracy": [block]}
    world = LocalWorld(build_config(config, "test"))
    world.weights = lambda spec: "weights"
    odd, own_a = expand(world.config, world)
    assert "group odd: member 'own_c' is not a task" in odd.problem
    assert own_a.problem == ""
