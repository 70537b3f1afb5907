"""Which rows of a run a cell that is measured again is held against, and which folders fill its placeholders."""

from suite.runs.run import Options, run
from suite.runs.verify import config_of, recompute
from tests.runs.fakes import FakeExecutor, FakeWorld, matrix


def test_variants_of_one_task_are_told_apart(tmp_path):
    variants = [{}, {"num_fewshot": 5}, {"limit": 3}, {"apply_chat_template": True}]
    block = {"methods": ["dense", "cats"], "sparsities": [0.5], "tasks": [{"name": "t1"} | v for v in variants]}
    folder = run(matrix(accuracy=[block]), FakeWorld(), FakeExecutor(), Options(tmp_path)).folder
    said: list[str] = []
    n_cells = 2 * 2 * len(variants)  # models, methods
    assert recompute(folder, config_of(folder, {}), FakeWorld(), FakeExecutor(), n_cells, said.append) == []
    assert said[-1] == f"{n_cells} cells measured again"
