"""What differs between two runs, and why: keys that changed, values that changed. Reads files only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from suite import schema
from suite.runs.view.manifest import key_fields
from suite.runs.view.read import Row, Run, timings_of
from suite.speed.compared import VERDICTS, verdicts

_TOP = 10


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mapping as one level: ``{"versions": {"torch": "2"}}`` is ``{"versions.torch": "2"}``."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    found = {}
    for key, item in value.items():
        found.update(flat(item, f"{prefix}.{key}" if prefix else str(key)))
    return found


def changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Entries that differ, flattened: name to (value in one, value in other)."""
    a, b = flat(one), flat(other)
    return {name: (a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)}


def compare(first: Path, second: Path) -> list[str]:
    """Lines that say what differs between two run folders and why.

    Raises
    ------
    InputError
        One of them is not a run folder.
    """
    a, b = Run.read(first), Run.read(second)
    lines = [f"A  {first}", f"B  {second}"]
    for name in ("suite_version", "git", "python", "platform", "packages", "device", "config"):
        pair = ({name: run.manifest.get(name)} for run in (a, b))
        lines += [f"{key}: {_brief(old)} -> {_brief(new)}" for key, (old, new) in changed(*pair).items()]
    lines += _rows_lines(a, b, schema.ACCURACY, "value")
    lines += _rows_lines(a, b, schema.SPEED, "latency_us_median")
    return lines


def _rows_lines(a: Run, b: Run, table: schema.Table, column: str) -> Iterator[str]:
    ours, theirs = a.rows(table), b.rows(table)
    if not ours and not theirs:
        return
    both = [key for key in ours if key in theirs]
    yield f"{table.file}: {len(both)} rows in both, {len(ours) - len(both)} only in A, {len(theirs) - len(both)} only in B"
    for one, own, others in (("A", ours, theirs), ("B", theirs, ours)):
        alone = [key for key in own if key not in others]
        yield from (f"  only in {one}: {_setting(key)}" for key in alone[:_TOP])
        if len(alone) > _TOP:
            yield f"  and {len(alone) - _TOP} more only in {one}"
    why: Counter[str] = Counter()
    for one, other in {(ours[k]["cell_id"], theirs[k]["cell_id"]) for k in both}:
        if one != other and one in a.manifest["cells"] and other in b.manifest["cells"]:
            fields = changed(key_fields(a.manifest, one), key_fields(b.manifest, other))
            why.update(f"{field}: {old} -> {new}" for field, (old, new) in fields.items())
    for reason, count in sorted(why.items(), key=lambda item: (-item[1], item[0]))[:_TOP]:
        yield f"  key changed in {count} cells: {reason}"
    yield from sorted({line for k in both if (line := _examples(ours[k], theirs[k]))})
    differing = [key for key in both if ours[key][column] != theirs[key][column]]
    yield f"  {column}: {len(both) - len(differing)} equal, {len(differing)} differ"
    found = _verdicts(a, b, ours, theirs, both) if table is schema.SPEED else {}
    if found:
        counts = Counter(found.values())
        yield f"  timings of B: {', '.join(f'{counts[verdict]} {verdict}' for verdict in VERDICTS)}"
    for key in sorted(differing, key=lambda k: -_difference(ours[k][column], theirs[k][column]))[:_TOP]:
        line = f"    {_setting(key)}: {ours[key][column] or 'empty'} -> {theirs[key][column] or 'empty'}"
        yield f"{line}, {found[key]}" if key in found else line


def _verdicts(
    a: Run,
    b: Run,
    ours: Mapping[tuple[str, ...], Row],
    theirs: Mapping[tuple[str, ...], Row],
    both: Sequence[tuple[str, ...]],
) -> dict[tuple[str, ...], str]:
    """Whether B was faster or slower, by the rounds of both runs."""
    old, new = timings_of(a.folder), timings_of(b.folder)
    pairs = [(old.get(ours[key]["cell_id"], []), new.get(theirs[key]["cell_id"], [])) for key in both]
    return dict(zip(both, verdicts(pairs), strict=True))


def _examples(one: Row, other: Row) -> str:
    """Split that the few-shot examples of a row come from, in both runs; empty where neither says one."""
    old, new = (row.get("fewshot_split") or "an unknown split" for row in (one, other))
    if not (one.get("fewshot_split") or other.get("fewshot_split")):
        return ""
    return f"  examples of {one['task']}: from {old}" + ("" if old == new else f" -> {new}")


def _brief(value: Any) -> str:
    """A value of a manifest for one line: a long list by its number of entries."""
    text = str(value)
    return text if len(text) <= 80 else f"{len(value)} entries" if isinstance(value, list) else text[:77] + "..."


def _setting(key: Sequence[str]) -> str:
    return " ".join(part for part in key if part)


def _difference(one: str, other: str) -> float:
    """Relative difference of two numbers; infinite if one is missing."""
    if not one or not other:
        return float("inf")
    a, b = float(one), float(other)
    return abs(a - b) / max(abs(a), abs(b), 1e-300)
