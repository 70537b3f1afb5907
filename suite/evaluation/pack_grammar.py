"""Seeded generator of the embedded pack's grammar minimal pairs.

The templates stand in ``pack/grammar_templates.toml``. A template is one or more patterns plus slots. ``{slot}`` is replaced
by one of the slot's values (separated by ``|``), ``[good/bad]`` marks where the two sentences of the pair differ, and
``{~slot}`` swaps good and bad inside the value, so that one list of verb phrases serves singular and plural subjects. The
patterns of a template take turns, which balances singular against plural.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from suite.errors import InputError

__all__ = ["ITEMS_PER_TEMPLATE", "SEED", "generate_pairs", "to_jsonl"]

SEED = 20250517
ITEMS_PER_TEMPLATE = 13
TEMPLATES = Path(__file__).parent / "pack" / "grammar_templates.toml"

_SLOT = re.compile(r"\{(~?)(\w+)\}")
_CHOICE = re.compile(r"\[([^/\]]*)/([^\]]*)\]")


def _expansions(pattern: str, slots: Mapping[str, str]) -> list[str]:
    """All ways to fill the pattern's slots, the ``[good/bad]`` marks still in place."""
    names: list[tuple[str, str]] = list(dict.fromkeys(_SLOT.findall(pattern)))
    columns: list[list[str]] = []
    for swap, name in names:
        values = slots[name].split("|")
        columns.append([_CHOICE.sub(r"[\2/\1]", value) for value in values] if swap else values)
    filled = []
    for chosen in itertools.product(*columns):
        sentence = pattern
        for (swap, name), value in zip(names, chosen, strict=True):
            sentence = sentence.replace(f"{{{swap}{name}}}", value)
        filled.append(sentence)
    return filled


def _pairs(template: Mapping[str, Any], shared: Mapping[str, str], seed: int) -> Iterator[tuple[str, str]]:
    """Shuffled (good, bad) pairs of one template, its patterns in turn, until one pattern is used up."""
    rng = random.Random(f"{seed}/{template['name']}")
    pools = []
    for pattern in template["patterns"]:
        pool = _expansions(pattern, {**shared, **template.get("slots", {})})
        rng.shuffle(pool)
        pools.append(pool)
    for row in zip(*pools, strict=False):
        for marked in row:
            yield _CHOICE.sub(r"\1", marked), _CHOICE.sub(r"\2", marked)


def generate_pairs(seed: int = SEED, per_template: int = ITEMS_PER_TEMPLATE) -> list[dict[str, str]]:
    """Generate the minimal pairs; the same seed gives the same pairs.

    Parameters
    ----------
    seed
        Decides which fillings are drawn.
    per_template
        Pairs of each template.

    Returns
    -------
    list of dict
        Keys ``id``, ``phenomenon``, ``template``, ``good``, ``bad``; no sentence occurs twice. Rounds of one item of every
        template, in an order shuffled anew each round: any first N items are balanced over the templates.

    Raises
    ------
    InputError
        A template cannot give that many different pairs.
    """
    source = tomllib.loads(TEMPLATES.read_text(encoding="utf-8"))
    items: list[dict[str, str]] = []
    seen: set[str] = set()
    for template in source["template"]:
        name = template["name"]
        fresh = (pair for pair in _pairs(template, source["shared"], seed) if seen.isdisjoint(pair))
        index = 0
        for good, bad in itertools.islice(fresh, per_template):
            seen.update((good, bad))
            entry = {"id": f"grammar/{name}/{index:02d}", "phenomenon": template["phenomenon"], "template": name}
            items.append({**entry, "good": good, "bad": bad})
            index += 1
        if index < per_template:
            raise InputError(
                f"template {name} of {TEMPLATES.name} gives {index} pairs, asked for {per_template}: ask for fewer"
            )
    rng = random.Random(f"{seed}/order")
    ordered = []
    for turn in range(per_template):
        one_each = items[turn::per_template]
        rng.shuffle(one_each)
        ordered += one_each
    return ordered


def to_jsonl(items: list[dict[str, str]]) -> str:
    """Render items as JSONL: one object a line, ASCII, keys in the order given."""
    return "".join(json.dumps(item) + "\n" for item in items)
