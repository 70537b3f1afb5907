"""A task that cannot be built is an error of its own kind, found once however many settings it runs under."""

import json

import pytest

from suite.errors import CellInputError
from suite.evaluation import evaluator as room
from suite.evaluation.tasks import TaskSpec
from suite.registry import get_method

ROW = {"id": "1", "question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "Z"}


def test_a_bad_document_is_a_bad_task_and_is_looked_for_once(tiny, tmp_path, monkeypatch):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    spec = TaskSpec("arc_easy", "data_dir", files={"test": path})
    calls = []
    real = room.BuiltTask
    monkeypatch.setattr(room, "BuiltTask", lambda *arguments: calls.append(arguments) or real(*arguments))
    evaluator = room.Evaluator(tiny, batch_size=2, seed=0)
    for _ in range(2):
        with pytest.raises(CellInputError, match="arc_easy cannot be loaded"):
            evaluator.run(spec, get_method("dense"), mode="none")
    assert len(calls) == 1
