"""Checks of a run folder: hashes of its files, keys of its cells, values against samples, sampled cells measured again."""

from __future__ import annotations

import json
import math
import random
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from suite.config import MatrixConfig, build_config
from suite.errors import InputError
from suite.evaluation.results import WEIGHT
from suite.files import links_in
from suite.fitting.calibration import PYDOC
from suite.runs.audit.compare import Row, changed, read_rows
from suite.runs.audit.tables import RELATIVE, read_samples, table_problems
from suite.runs.cells.accuracy import ID_LENGTH, AccuracyCell, World, expand
from suite.runs.cells.matrix import Matrix
from suite.runs.runner import Executor, Runner, Say
from suite.runs.store import CellStore, canonical, sha256_of
from suite.runs.view.manifest import file_hashes, key_fields, read_manifest
from suite.statistics import statistic

# Of models that no folder but the root holds together.
_NUMBERED = re.compile(r"\{model_dir_([1-9]\d{0,3})\}")


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


def config_of(folder: Path, overrides: Mapping[str, Any], *, allow_code: bool = False) -> MatrixConfig:
    """Matrix that a run folder was made from; its placeholders ``{data_dir}``, ``{model_dir}`` ... must be overridden.

    A manifest may come from anywhere: it names no folder of this machine, and Python only with ``allow_code``.
    ``model_dir`` of the overrides is a list: the n-th folder fills ``{model_dir_n}``, a single one ``{model_dir}``.

    Raises
    ------
    InputError
        A placeholder is left, a folder that is no placeholder, or Python that is not allowed.
    """
    data = dict(read_manifest(folder)["config"])
    build_config(data, str(folder))  # the types of all that is looked at below
    text = json.dumps(data)
    _refuse_folders(folder, json.loads(_NUMBERED.sub("{model_dir}", text)))
    code = sorted(_third_party(data))
    if code and not allow_code:
        raise InputError(f"run {folder} runs Python of {code[0]}: read it, then give --allow-code")
    given = _model_folders(folder, text, overrides.get("model_dir") or [])
    for name in ("data_dir", "include_path"):
        if f"{{{name}}}" in text:
            if overrides.get(name) is None:
                raise InputError(f"run {folder} was made with a {name}: give --{name.replace('_', '-')}")
            given[name] = str(overrides[name])
    for name, value in given.items():
        text = text.replace(f"{{{name}}}", json.dumps(value)[1:-1])
    return build_config(json.loads(text), str(folder))


_PLACEHOLDERS = {("{data_dir}",), ("{include_path}",), ("{model_dir}",)}


def _model_folders(folder: Path, config: str, given: Sequence[str]) -> dict[str, str]:
    """What the folders of models stand for in the text of a matrix."""
    numbers = {int(number) for number in _NUMBERED.findall(config)}
    if not numbers and "{model_dir}" not in config:
        return {}
    n = max(numbers, default=1)
    if len(given) != n:
        wanted = "once" if n == 1 else f"{n} times"
        raise InputError(
            f"run {folder} has its models in {n} folder{'s' * (n > 1)}: give --model-dir {wanted}, not {len(given)}"
        )
    return {"model_dir": given[0], **{f"model_dir_{number}": one for number, one in enumerate(given, 1)}}


def _refuse_folders(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a matrix of a manifest that names files by anything but a placeholder, which the user fills."""
    predictor, text = config.get("predictor") or {}, config.get("calibration") or {}
    sources = [text.get("source"), *predictor.get("sources", [])]
    sources += [one for block in config.get("accuracy", []) for one in block.get("fit_sources") or []]
    named = {"data_dir": [config.get("data_dir")], "include_path": [config.get("include_path")]}
    named |= {"model": [m.get("id") for m in config.get("models", [])]}
    named |= {"text of a fit": [str(one).removeprefix("file:") for one in sources if str(one).startswith("file:")]}
    tasks = [
        task for block in config.get("accuracy", []) for task in block.get("tasks", []) if isinstance(task, Mapping)
    ]
    named |= {"text of a task": [(task.get("options") or {}).get("text") for task in tasks]}
    for what, values in named.items():
        for value in map(str, filter(None, values)):
            parts = Path(value).parts
            is_folder = what != "model" or value.startswith(("/", "~", ".")) or Path(value).exists()
            if ".." in parts or (is_folder and parts[:1] not in _PLACEHOLDERS):
                raise InputError(
                    f"run {folder}: {what} {value!r} names a folder of the machine it was made on, not a placeholder; it "
                    "is not read"
                )


def _third_party(config: Mapping[str, Any]) -> set[str]:
    """What of a matrix runs Python that is not the suite's: methods ``module:Class``, and own tasks' ``!function``."""
    blocks = [*config.get("accuracy", []), *config.get("speed", [])]
    methods = [method for block in blocks for method in block.get("methods", [])]
    names = [str(method.get("name") if isinstance(method, Mapping) else method) for method in methods]
    own = {"the tasks of its include_path"} if config.get("include_path") else set()
    return {f"method {name}" for name in names if ":" in name} | own


def recompute(
    folder: Path, config: MatrixConfig, world: World, executor: Executor, n_cells: int, say: Say, seed: int = 0
) -> list[str]:
    """Measure sampled accuracy cells again, in a store of their own, and compare with the folder's rows.

    Returns
    -------
    list of problems; a cell whose key has changed since is measured all the same, and what changed is said.
    """
    manifest = read_manifest(folder)
    rows: dict[tuple[str, ...], list[Row]] = {}
    for row in read_rows(folder, "accuracy.csv"):
        if row["status"] == "ok":
            rows.setdefault(_row_identity(row, key_fields(manifest, row["cell_id"])), []).append(row)
    cells = [cell for cell in expand(config, world) if _identity(cell) in rows]
    chosen = random.Random(seed).sample(cells, min(n_cells, len(cells)))
    problems = []
    with tempfile.TemporaryDirectory() as temporary:
        store = CellStore(Path(temporary))
        Runner(Matrix(chosen, []), executor, store, Path(temporary) / "fits", say=say).run()
        for cell in chosen:
            old = rows[_identity(cell)]
            if old[0]["cell_id"] != cell.id:
                fields = changed(key_fields(manifest, old[0]["cell_id"]), cell.key_fields)
                say(f"{cell.label}: its key has changed since: {', '.join(fields)}")
            record = store.get(cell.key)
            new = record["rows"] if record is not None and record["status"] == "ok" else []
            problems += _differences(cell, old, new)
    say(f"{len(chosen)} cells measured again")
    return problems


def _differences(cell: AccuracyCell, old: Sequence[Row], new: Sequence[Mapping[str, Any]]) -> list[str]:
    values = {(row["metric"], row["filter"]): float(row["value"]) for row in new}
    problems = []
    for row in old:
        value = values.get((row["metric"], row["filter"]))
        if value is None or not math.isclose(value, float(row["value"]), rel_tol=RELATIVE, abs_tol=1e-9):
            problems.append(f"{cell.label} {row['metric']}: was {row['value']}, is {value}")
    return problems


def _identity(cell: AccuracyCell) -> tuple[str, ...]:
    estimator = cell.fit.estimator if cell.fit else ""
    # a setting may have fits of several ranks, texts and seeds; that on pydoc has another key with another Python
    named = cell.fit is not None and (cell.fit.options is not None or cell.fit.calibration != PYDOC)
    fit = (cell.fit_key or "")[:16] if named else ""
    setting = (cell.method, cell.mode, f"{cell.sparsity:g}", estimator, fit, cell.scope)
    return (cell.model_name, cell.dtype, _variant(cell.key_fields), *setting, str(cell.decided_seed))


def _variant(fields: Mapping[str, Any]) -> str:
    """A task as it was asked for: its name, examples, limit, chat and options; wherever its data are found."""
    return canonical({name: value for name, value in fields["task"].items() if name not in ("data", "source")})


def _row_identity(row: Row, fields: Mapping[str, Any]) -> tuple[str, ...]:
    fit = row["fit_id"] if row["predictor"] or row["calibration"] != PYDOC else ""
    target = f"{float(row['sparsity_target']):g}"
    setting = (row["method"], row["mode"], target, row["estimator"], fit, row["scope"])
    return (row["model"], row["dtype"], _variant(fields), *setting, row["seed"])
