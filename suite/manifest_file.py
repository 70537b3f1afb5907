"""Reads manifest.json, which may come from anywhere: what every reader relies on is checked here, once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from suite.errors import InputError, shown
from suite.schema import SCHEMA_VERSION

NAME = "manifest.json"
_REMEDY = "remove the folder and run the matrix again: finished cells are in the store"
# Type of each entry, and of what is inside it; an entry may be left out or null.
_ENTRIES: dict[str, tuple[type, type]] = {
    **dict.fromkeys(("run_id", "title"), (str, object)),
    **dict.fromkeys(("argv", "seeds"), (list, object)),
    "unsealed": (list, str),
    **dict.fromkeys(("config", "in_domain", "packages", "device", "git"), (Mapping, object)),
    **dict.fromkeys(("cells", "key_common", "models"), (Mapping, Mapping)),
    **dict.fromkeys(("files", "measured", "fits", "data"), (Mapping, str)),
}
_OF_THE_CONFIG: dict[str, tuple[type, type]] = {
    **dict.fromkeys(("calibration", "predictor"), (Mapping, object)),
    **dict.fromkeys(("models", "accuracy", "speed", "seeds"), (list, object)),
}
_OF_A_CELL = {"kind": str, "status": str, "fields": Mapping}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Manifest of a run folder.

    Raises
    ------
    InputError
        No run folder, no or a broken manifest, a newer schema.
    """
    path = folder / NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = "no such folder" if not folder.is_dir() else f"it has no {NAME}"
        raise InputError(f"{folder} is not a run folder: {what}; `countdown-suite ls runs` lists them") from error
    except RecursionError as error:
        raise InputError(f"{path} is broken: brackets are nested too deep; {_REMEDY}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is broken: {error}; {_REMEDY}") from error
    if not isinstance(manifest, dict):
        raise InputError(f"{path} is broken: it must hold a JSON object, got {type(manifest).__name__}; {_REMEDY}")
    version = manifest.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise InputError(f"{path} is broken: its schema_version {shown(version)} is not a whole number; {_REMEDY}")
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema_version {shown(version)} is newer than {SCHEMA_VERSION}, the newest this version reads; "
            "update countdown-suite"
        )
    for wrong in _wrong_types(manifest):
        raise InputError(f"{path} is broken: {wrong} is not of the type it must be; {_REMEDY}")
    return manifest


def whole(manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same manifest if it has all that keys are made of, as one that a run has written.

    Raises
    ------
    InputError
        What it lacks.
    """
    for name in ("run_id", "config", "cells", "key_common"):
        if manifest.get(name) is None:
            raise InputError(f"{folder / NAME} is broken: it has no {name}; {_REMEDY}")
    for name, cell in manifest["cells"].items():
        if cell["kind"] not in manifest["key_common"]:
            raise InputError(f"{folder / NAME} is broken: cells.{name} is of a kind that key_common lacks; {_REMEDY}")
    return manifest


def _wrong_types(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Names of entries with a text where a table belongs and the like."""
    yield from _wrong_entries(manifest, _ENTRIES, "")
    cells, config = manifest.get("cells"), manifest.get("config")
    for name, cell in cells.items() if isinstance(cells, Mapping) else ():
        if isinstance(cell, Mapping):
            yield from (f"cells.{name}.{f}" for f, kind in _OF_A_CELL.items() if not isinstance(cell.get(f), kind))
    if isinstance(config, Mapping):
        yield from _wrong_entries(config, _OF_THE_CONFIG, "config.")
        text, predictor = config.get("calibration"), config.get("predictor")
        if isinstance(text, Mapping) and text and not isinstance(text.get("source"), str):
            yield "config.calibration.source"
        if isinstance(predictor, Mapping):
            yield from _wrong_entries(predictor, {"sources": (list, str)}, "config.predictor.")


def _wrong_entries(table: Mapping[str, Any], kinds: Mapping[str, tuple[type, type]], place: str) -> Iterator[str]:
    for name, (kind, inside) in kinds.items():
        if name not in table or (table[name] is None and place):  # of the matrix, a null is the default
            continue
        value = table[name]
        if not isinstance(value, kind):
            yield place + name
            continue
        parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        yield from (f"{place}{name}.{part}" for part, item in parts if not isinstance(item, inside))
