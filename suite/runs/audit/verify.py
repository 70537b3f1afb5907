"""Checks of a run folder from its files: their hashes, keys of its cells, values against samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from suite.errors import InputError
from suite.evaluation.results import WEIGHT
from suite.files import links_in
from suite.runs.audit.tables import RELATIVE, read_samples, table_problems
from suite.runs.cells.base import ID_LENGTH
from suite.runs.store import sha256_of
from suite.runs.view.manifest import file_hashes, key_fields, read_manifest
from suite.runs.view.read import Row, read_rows
from suite.statistics import statistic


def verify_files(folder: Path) -> list[str]:
    """Problems of a run folder from its files alone; none if it is whole.

    Raises
    ------
    InputError
        No run folder.
    """
    links = sorted(links_in(folder)) if folder.is_dir() else []
    if links:  # what they lead to is nobody's result, and is not read
        return [f"{name}: is a link or no plain file" for name in links]
    manifest = read_manifest(folder)
    problems = [*_hash_problems(folder, manifest), *_key_problems(manifest)]
    if "measured" in manifest:  # folders of earlier versions do not say what was measured
        return problems + problems_of(lambda: table_problems(folder, manifest))
    return problems + problems_of(lambda: _value_problems(folder, manifest))


def problems_of(step: Callable[[], list[str]]) -> list[str]:
    """Problems that a step of the checks finds; a file that it cannot read is one."""
    try:
        return step()
    except InputError as error:
        return [str(error)]


def _hash_problems(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    recorded, found = manifest.get("files"), file_hashes(folder)
    if not recorded:
        return ["manifest.json has no file hashes: write the report, which seals the folder"]
    problems = [f"{name}: is missing" for name in recorded if name not in found]
    problems += [f"{name}: is not in the manifest" for name in found if name not in recorded]
    problems += [f"{n}: its hash does not match the manifest" for n in found if recorded.get(n, found[n]) != found[n]]
    # a report that is written again seals what it finds: what was measured is held against what the run wrote
    for name, digest in manifest.get("measured", {}).items():
        if name in found and found[name] != digest:
            problems.append(f"{name}: is not what the run wrote: it was changed since")
    return sorted(problems)


def _key_problems(manifest: Mapping[str, Any]) -> list[str]:
    problems = []
    for cell_id in manifest["cells"]:
        if sha256_of(key_fields(manifest, cell_id))[:ID_LENGTH] != cell_id:
            problems.append(f"cell {cell_id}: its key fields in the manifest do not hash to its id")
    return problems


def _value_problems(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Rows without a cell, and values that the samples do not give."""
    samples = read_samples(folder).values
    problems = []
    for number, row in enumerate(read_rows(folder, "accuracy.csv"), 2):
        cell = manifest["cells"].get(row["cell_id"])
        if cell is None or cell["status"] != row["status"]:
            problems.append(f"accuracy.csv line {number}: cell {row['cell_id']} is not so in the manifest")
        elif row["status"] == "ok":
            value = _from_samples(row, samples)
            if value is not None and not math.isclose(value, float(row["value"]), rel_tol=RELATIVE, abs_tol=1e-12):
                problems.append(
                    f"accuracy.csv line {number}: {row['metric']} is {row['value']}, its samples give {value:.10g}"
                )
    return problems


def _from_samples(row: Row, samples: Mapping[tuple[str, str], Mapping[str, float]]) -> float | None:
    for metric in (f"{row['metric']},{row['filter']}", row["metric"]):
        values = samples.get((row["cell_id"], metric))
        if values and len(values) == int(row["n_samples"]):
            weights = samples.get((row["cell_id"], metric + WEIGHT), {})
            return statistic(list(values.values()), [weights.get(d, 1.0) for d in values], row["metric"])
    return None
