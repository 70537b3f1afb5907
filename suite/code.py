"""Which source decides a number: the modules that an entry reaches through imports, and their hash. Imports none of them."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from suite.errors import InputError

if TYPE_CHECKING:
    from grimp import ImportGraph

_HOUSE = ("suite", "kernels_numba", "baselines")
# Names every method, and a cell depends on its own: hashed without that table, whose modules are not followed.
_REGISTRY, _TABLE = "suite.registry", "METHODS"
# Serves every kind of cell: hashed, but what it imports is followed from the entry of the kind.
_EXECUTOR = "suite.runs.executor"
ANALYSIS = "suite.analysis.coefficients"
# Where the executor enters for each kind of cell, and the report.
ENTRIES: dict[str, tuple[str, ...]] = {
    "accuracy": (_EXECUTOR, "suite.evaluation.evaluator", "suite.fitting.thresholds", "suite.fitting.predictor"),
    "analysis": (_EXECUTOR, ANALYSIS, "suite.modeling.loading", "suite.data_files"),
    "speed": (_EXECUTOR, "suite.speed.cases", "suite.fitting.artifacts"),
    "report": ("suite.report.page",),
}
_QUOTED = re.compile(rf"""["']((?:{"|".join(_HOUSE)})(?:\.\w+)+)["']""")


@cache
def code_hash(entries: tuple[str, ...]) -> str:
    """First 16 hex digits of the SHA-256 over the source of all modules that are `reached` from ``entries``."""
    digest = hashlib.sha256()
    for module in sorted(reached(entries)):
        digest.update(module.encode() + b"\0" + hashlib.sha256(source_of(module)).digest())
    return digest.hexdigest()[:16]


@cache
def reached(entries: tuple[str, ...]) -> frozenset[str]:
    """Modules that the entries import, themselves included: of the suite, its kernels and baselines, or of an entry's package.

    Imports inside functions count, those for type checkers only do not; a string that names a module counts as its import.
    A package's ``__init__`` counts where something is imported from it.
    """
    found: set[str] = set()
    todo = list(entries)
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += _imports(module)
    return frozenset(found)


@cache
def _imports(module: str) -> frozenset[str]:
    if module == _EXECUTOR:
        return frozenset()
    package = module.partition(".")[0]
    if package not in _HOUSE:
        return frozenset(_graph(package).find_modules_directly_imported_by(module) if _is_package(package) else ())
    graph = _graph(*_HOUSE)
    named = _QUOTED.findall(source_of(module).decode()) if module != _REGISTRY else []
    return frozenset({*graph.find_modules_directly_imported_by(module), *(graph.modules & set(named))})


@cache
def _graph(*packages: str) -> ImportGraph:
    import grimp
    from grimp.exceptions import GrimpException

    try:
        return grimp.build_graph(*packages, cache_dir=None, exclude_type_checking_imports=True)
    except GrimpException as error:
        raise InputError(f"imports of package {packages[0]} cannot be read: {error}; mend that file") from error


def _is_package(name: str) -> bool:
    """Whether a module of the user's own is a package, whose modules may import each other."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None and spec.submodule_search_locations is not None


@cache
def source_of(module: str) -> bytes:
    """What of a module's file decides numbers.

    Raises
    ------
    InputError
        The module has no file.
    """
    source = _file(module).read_bytes()
    return without(source, _TABLE) if module == _REGISTRY else source


def _file(module: str) -> Path:
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    candidates = [Path(spec.origin)] if spec is not None and spec.origin and not rest else []
    for folder in map(Path, folders or []):
        path = folder.joinpath(*rest)
        candidates += [path / "__init__.py", path.with_name(f"{path.name}.py")]
    for path in candidates:
        if path.is_file():
            return path
    raise InputError(
        f"module {module!r} has no Python file: reinstall countdown-suite, or put its folder on PYTHONPATH"
    )


def without(source: bytes, name: str) -> bytes:
    """Python source without the lines that assign a module's variable."""
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            lines[node.lineno - 1 : node.end_lineno] = [b""] * len(lines[node.lineno - 1 : node.end_lineno])
    return b"".join(lines)


def strings_of(module: str, known: Iterable[str]) -> list[str]:
    """Those of ``known`` that are written as strings in a module's source: the methods that an analysis is over."""
    text = source_of(module).decode()
    return [name for name in known if f'"{name}"' in text]
