"""A task with several numbers of examples, chat options or limits has a column for each."""

import json

import pandas as pd
import pytest

from suite.report.page import write_report
from suite.report.rebuild import rebuild_problems
from suite.schema import ACCURACY
from tests.report.parts import quality
from tests.report.synthetic import hand_run, hits, manifest

CHAT = '{"apply_chat_template":true,"fewshot_as_multiturn":true}'
PROMPTS = [
    json.dumps({"apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": t}) for t in "ab"
]
# name of the column: number of examples, chat, limit, right answers of dense and cats of 100
SHOTS = {"0-shot": ("0", "", "", 90, 60), "5-shot": ("5", "", "", 95, 80)}
CHATS = {"no-chat": ("0", "", "", 90, 60), "chat": ("0", CHAT, "", 80, 50)} | {
    f"chat-with-system-prompt-{i}": ("0", text, "", 70 + i, 40) for i, text in enumerate(PROMPTS, 1)
}
LIMITS = {"all-documents": ("0", "", "", 90, 60), "limit-100": ("0", "", "100", 80, 50)}
MIXED = {"0-shot,no-chat": ("0", "", "", 90, 60), "5-shot,chat": ("5", CHAT, "", 95, 80)}


def run_of(folder, variants, failed=()):
    """A run with the variants of one task beside another task; cats' cells of ``failed`` ones have not run."""
    answers = {
        setting: {f"arc_easy {name}": hits(v[place]) for name, v in variants.items()} | {"piqa": hits(70)}
        for place, setting in ((3, ("dense", "none", 0.0, 0.0)), (4, ("cats", "ideal", 0.5, 0.5)))
    }
    folder = hand_run(folder, answers)
    rows = pd.read_csv(folder / "accuracy.csv", dtype=str, keep_default_na=False)
    fields = {}
    for index, (cell, task) in rows[["cell_id", "task"]].iterrows():
        shots, chat, limit = variants.get(task.partition(" ")[2], ("0", "", ""))[:3]
        rows.loc[index, ["task", "num_fewshot", "chat", "limit"]] = [task.partition(" ")[0], shots, chat, limit]
        asked = {"num_fewshot": None if shots == "0" else int(shots)}
        fields[cell] = {"kind": "accuracy", "status": "ok", "fields": {"task": asked}}
        if rows.loc[index, "method"] == "cats" and task.partition(" ")[2] in failed:
            rows.loc[index, ["status", "value", "num_fewshot"]] = ["failed", "", str(asked["num_fewshot"] or "")]
    rows.to_csv(folder / "accuracy.csv", index=False)
    (folder / "manifest.json").write_text(json.dumps(manifest(cells=fields, key_common={"accuracy": {}})))
    return folder


@pytest.mark.parametrize("variants", [SHOTS, CHATS, LIMITS, MIXED], ids=["shots", "chats", "limits", "mixed"])
def test_each_variant_is_a_column(tmp_path, variants):
    folder = run_of(tmp_path / "run", variants)
    accuracy = quality(folder)
    ((_, settings),) = accuracy.summary_blocks
    found = [{task: float(cell["value"]) for task, cell in one.cells.items()} for one in settings]
    assert found == [
        {f"arc_easy[{name}]": v[place] / 100 for name, v in variants.items()} | {"piqa": 0.7} for place in (3, 4)
    ]
    assert accuracy.summary_tasks == [*sorted(f"arc_easy[{name}]" for name in variants), "piqa"]
    page = write_report(folder).read_text()
    assert rebuild_problems(folder) == []
    assert all(f"| arc_easy[{name}] " in page for name in variants)


def test_a_failed_cell_stands_in_the_column_of_its_variant(tmp_path):
    for name in SHOTS:
        found = quality(run_of(tmp_path / name, SHOTS, failed=[name]))
        ((_, (_, cats)),) = found.summary_blocks
        assert {task for task, cell in cats.cells.items() if cell["status"] == "failed"} == {f"arc_easy[{name}]"}
        assert len(cats.cells) == 3


def test_one_variant_keeps_its_name(tmp_path):
    for limit in ("", "100"):
        folder = run_of(tmp_path / f"run{limit}", {"x": ("5", CHAT, limit, 90, 60)}, failed=["x"])
        assert quality(folder).summary_tasks == ["arc_easy", "piqa"]


def test_rows_are_sorted_by_chat():
    rows = [{"chat": chat, "cell_id": cell} for chat, cell in ((CHAT, "a"), (None, "b"))]
    assert ACCURACY.sorted(rows) == ACCURACY.sorted(rows[::-1]) == rows[::-1]
