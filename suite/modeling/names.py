"""Short names of models that are compared, no two of them the same. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from suite.modeling.sources import ModelRef


def distinct_names(refs: Sequence[ModelRef]) -> dict[str, str]:
    """Name of each model by its spec: the shortest tail of its path or hub id that no other of the models ends with.

    A model alone keeps ``ModelRef.name``, and ``embedded`` keeps its own beside any. Revisions of one hub id are told
    apart by ``@revision``, a GGUF file by its suffix from a folder of its stem; two specs of one model have one name.
    """
    short = {ref.spec: _parts(ref, full=False) for ref in refs}
    full = {ref.spec: _parts(ref, full=True) for ref in refs}
    crowded = {parts for parts in short.values() if len({full[s] for s, p in short.items() if p == parts}) > 1}
    places = {spec: full[spec] if parts in crowded else parts for spec, parts in short.items()}
    others = set(places.values())
    return {spec: _shortest_tail(place, others - {place}) for spec, place in places.items()}


def named_parameters(name: str) -> float | None:
    """Parameters of a model by its name (``...-8B-...``); None where it names no size."""
    found = re.findall(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([MmBb])(?![A-Za-z0-9])", name)
    return float(found[-1][0]) * (1e6 if found[-1][1] in "Mm" else 1e9) if found else None


def _parts(ref: ModelRef, *, full: bool) -> tuple[str, ...]:
    """Components of a model's place; the last without what seldom matters (suffix, revision) unless ``full``."""
    if ref.kind == "embedded":
        return (ref.name,)
    if ref.kind == "hub":
        model_id, _, revision = ref.spec.partition("@")
        owner, last = model_id.split("/")[:-1], ref.name
        return (*owner, f"{last}@{revision or 'main'}" if full else last)
    path = Path(ref.spec).expanduser()
    # a folder's own name is that of what it leads to, a file's that of the link
    path = path.resolve() if ref.kind == "folder" else path.parent.resolve() / path.name
    return (*path.parts[:-1], path.name if full else ref.name)


def _shortest_tail(place: tuple[str, ...], others: set[tuple[str, ...]]) -> str:
    for length in range(1, len(place)):
        tail = place[-length:]
        if not any(other[-length:] == tail for other in others):
            return PurePosixPath(*tail).as_posix()
    return PurePosixPath(*place).as_posix()
