"""manifest.json: what a run was made of and the hashes of its files, without a path of the machine."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from suite import __version__, manifest_file
from suite.code import REPORT, code_hash
from suite.config import MatrixConfig
from suite.devices import Device
from suite.errors import InputError
from suite.files import refuse_links
from suite.fitting.calibration import Calibration
from suite.manifest_file import NAME, whole
from suite.runs.cells.base import Cell
from suite.runs.cells.matrix import Matrix
from suite.runs.machine import git_state
from suite.runs.store import Record, sha256_of, write_atomically
from suite.runs.view.scrub import Scrubber
from suite.schema import SCHEMA_VERSION, TABLES

# What runs and reports write; whatever else lies in a run folder is the user's: never removed, and a problem to verify.
_OWN = re.compile(
    rf"REPORT\.md|{'|'.join(re.escape(table.file) for table in TABLES)}|logs/[0-9a-f]{{16}}\.txt|tables/\w+\.md|"
    r"figures/\w+\.(csv|png|svg)",
    re.ASCII,
)


def build_manifest(
    run_id: str,
    config: MatrixConfig,
    matrix: Matrix,
    records: Mapping[str, Record | None],
    device: Device,
    scrub: Scrubber,
    argv: Sequence[str],
    packages: Mapping[str, str],
) -> dict[str, Any]:
    """Everything but the hashes of the files, which :func:`seal` adds."""
    resolved = scrub.value(portable(config).model_dump(mode="json"))
    cells = matrix.cells
    common = {
        kind: common_fields([c.key_fields for c in cells if c.kind == kind])
        for kind in sorted({cell.kind for cell in cells})
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "title": config.title,
        "suite_version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": [scrub.text(argument) for argument in argv],
        "config": resolved,
        "config_sha256": sha256_of(resolved),
        "git": git_state(),
        "report_code": code_hash((REPORT,)),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": dict(packages),
        "device": {"type": device.type, "name": device.name, "driver": device.driver},
        "seeds": config.seeds,
        "models": _models(matrix, scrub),
        "data": {c.task.name: c.key_fields["task"]["data"] for c in matrix.of_models},
        "fits": _fits(matrix, records),
        "in_domain": {scrub.text(s): Calibration(s).in_domain for s in _sources(matrix)},
        "key_common": scrub.value(common),
        "cells": {c.id: _cell(c, records[c.key], common[c.kind], scrub) for c in sorted(cells, key=lambda c: c.id)},
    }


def portable(config: MatrixConfig) -> MatrixConfig:
    """The matrix with the folders that differ between machines as placeholders."""
    changes = {name: f"{{{name}}}" for name in ("data_dir", "include_path") if getattr(config, name) is not None}
    return config.model_copy(update=changes)


def common_fields(fields: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Key fields that all cells share: written once instead of once per cell."""
    if not fields:
        return {}
    return {name: value for name, value in fields[0].items() if all(name in f and f[name] == value for f in fields)}


def key_fields(manifest: Mapping[str, Any], cell_id: str) -> dict[str, Any]:
    """Key fields of a cell as they were hashed."""
    cell = manifest["cells"][cell_id]
    return {**manifest["key_common"][cell["kind"]], **cell["fields"]}


def _models(matrix: Matrix, scrub: Scrubber) -> dict[str, dict[str, Any]]:
    """What stands behind each name of the tables: the model as it was named, its weights, the types it was loaded in."""
    found: dict[str, dict[str, Any]] = {}
    for cell in matrix.of_models:
        new = {"id": scrub.text(cell.model), "weights": cell.key_fields["weights"], "dtypes": []}
        one = found.setdefault(cell.model_name, new)
        one["dtypes"] = sorted({*one["dtypes"], cell.dtype})
    return found


def _sources(matrix: Matrix) -> list[str]:
    """Calibration sources of all fits."""
    return sorted({fit.calibration for fit in matrix.fits.values()})


def _fits(matrix: Matrix, records: Mapping[str, Record | None]) -> dict[str, str]:
    found = {}
    for cell in matrix.fitted:
        record = records[cell.key]
        if cell.fit_key and record is not None and record.get("fit_sha256"):
            found[cell.fit_key[:16]] = str(record["fit_sha256"])
    return dict(sorted(found.items()))


def _cell(cell: Cell, record: Record | None, common: Mapping[str, Any], scrub: Scrubber) -> dict[str, Any]:
    own = {name: value for name, value in cell.key_fields.items() if name not in common}
    found: dict[str, Any] = {"kind": cell.kind, "label": cell.label, "fields": scrub.value(own)}
    if record is None:
        return {**found, "status": "missing"}
    found |= {"status": record["status"], "elapsed_s": record["elapsed_s"], "created": record["created"]}
    if record["reason"]:
        found["reason"] = scrub.text(record["reason"])
    if record.get("fit_sha256"):
        found["fit_sha256"] = record["fit_sha256"]
    return found


def seal(folder: Path) -> None:
    """Write the SHA-256 of every file of a run folder into its manifest: last, when all files are there."""
    refuse_links(folder)
    manifest = read_manifest(folder)
    manifest.pop("unsealed", None)
    manifest["files"] = {name: digest for name, digest in file_hashes(folder).items() if _OWN.fullmatch(name)}
    write_atomically(folder / NAME, manifest_bytes(manifest))


def is_same(folder: Path, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> bool:
    """Whether a sealed run folder already holds these files with a report by the same code, and nothing was changed."""
    try:
        old = read_manifest(folder)
    except InputError:
        return False
    recorded = old.get("files") or {}
    names = ("config_sha256", "report_code", "cells", "device", "packages")
    return (
        "REPORT.md" in recorded
        and all(old.get(name) == manifest[name] for name in names)
        and all(recorded.get(name) == hashlib.sha256(data).hexdigest() for name, data in files.items())
        and recorded == {name: digest for name, digest in file_hashes(folder).items() if name in recorded}
    )


def sealed_later(manifest: Mapping[str, Any], mine: Collection[str], files: Mapping[str, bytes]) -> dict[str, Any]:
    """Manifest of a folder that is being written: what it may hold, and the hashes of what was measured.

    ``measured`` stays when a report is written again, so that a table that was changed in between is found.
    """
    measured = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return {**manifest, "unsealed": sorted({*mine, *files}), "measured": measured}


def owned(folder: Path) -> frozenset[str]:
    """Files of a run folder that runs and reports have written, by relative path: those that its manifest lists.

    Raises
    ------
    InputError
        No run folder.
    """
    manifest = read_manifest(folder)
    listed = {*(manifest.get("files") or {}), *(manifest.get("unsealed") or [])}
    return frozenset(name for name in listed if _OWN.fullmatch(name))


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by relative path of every file of a run folder but the manifest."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / NAME
    }


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """JSON with one line per entry, sorted, so that two manifests can be compared with diff."""
    return (json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Manifest of a run folder, with all that the keys of its cells are made of.

    Raises
    ------
    InputError
        No run folder, no or a broken manifest, a newer schema.
    """
    return whole(manifest_file.read_manifest(folder), folder)
