"""The matrix of a run folder, which may come from anywhere: what it names of this machine is given, and its code allowed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suite.config import MatrixConfig, build_config
from suite.errors import InputError
from suite.runs.view.manifest import read_manifest

# Of models that no folder but the root holds together.
_NUMBERED = re.compile(r"\{model_dir_([1-9]\d{0,3})\}")


def config_of(folder: Path, overrides: Mapping[str, Any], *, allow_code: bool = False) -> MatrixConfig:
    """Matrix that a run folder was made from; its placeholders ``{data_dir}``, ``{model_dir}`` ... must be overridden.

    A manifest may come from anywhere: it names no folder of this machine, and Python only with ``allow_code``.
    ``model_dir`` of the overrides is a list: the n-th folder fills ``{model_dir_n}``, a single one ``{model_dir}``.

    Raises
    ------
    InputError
        A placeholder is left, a folder that is not a placeholder, or Python that is not allowed.
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
