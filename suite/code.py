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
# Names every method, where a cell depends on its own, or everything public: hashed without that, which is not followed.
_TABLES = {"suite.registry": ("METHODS",), "suite": ("__version__", "_PUBLIC")}
ANALYSIS = "suite.analysis.coefficients"
REPORT = "suite.report.page"
# The worker does the work of all cells. Its modules that serve one kind alone count for that; what a fit was made by is
# known to the accuracy cells, a timing takes it as it is.
WORKER = "suite.runs.work.worker"
WORK = {
    "suite.runs.work.accuracy": "accuracy",
    "suite.runs.work.fits": "accuracy",
    "suite.runs.work.analysis": "analysis",
    "suite.runs.work.speed": "speed",
}
# Kernels for decode steps, which accuracy and its analysis never call: both are always masked. What decides so is hashed,
# what it would import is not followed; the kernel that selects for the masked backend is `suite.methods.base`'s own.
_DECODE = ("suite.modeling.decode", "suite.modeling.decode_layers", "suite.modeling.decode_probe")
CLOSED: dict[str, tuple[str, ...]] = {"accuracy": _DECODE, "analysis": _DECODE}
_QUOTED = re.compile(rf"""["']((?:{"|".join(_HOUSE)})(?:\.\w+)+)["']""")


def cell_hash(kind: str, methods: tuple[str, ...]) -> str:
    """Hash of what decides the numbers of a kind of cell; ``methods`` are the modules of its methods."""
    return code_hash((WORKER, *methods), CLOSED.get(kind, ()), others(kind))


def others(kind: str) -> tuple[str, ...]:
    """Modules of the worker's that serve other kinds of cells alone."""
    return tuple(module for module, own in WORK.items() if own != kind)


@cache
def code_hash(entries: tuple[str, ...], closed: tuple[str, ...] = (), shut: tuple[str, ...] = ()) -> str:
    """First 16 hex digits of the SHA-256 over the source of all modules that are `reached` from ``entries``."""
    digest = hashlib.sha256()
    for module in sorted(reached(entries, closed, shut)):
        digest.update(module.encode() + b"\0" + hashlib.sha256(source_of(module)).digest())
    return digest.hexdigest()[:16]


@cache
def reached(entries: tuple[str, ...], closed: tuple[str, ...] = (), shut: tuple[str, ...] = ()) -> frozenset[str]:
    """Modules that the entries import, themselves included: of the suite, its kernels and baselines, and of an entry's package.

    Imports inside functions count, those for type checkers only do not; a string that names a module counts as its import.
    The packages around a module count, as their ``__init__`` runs before it. The imports of ``closed`` modules do not, and
    ``shut`` ones are left out themselves.
    """
    found: set[str] = set(shut)
    todo = list(entries)
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += _around(module) if module in closed else _imports(module)
    return frozenset(found.difference(shut))


def _around(module: str) -> set[str]:
    return {module.rpartition(".")[0]} - {""}


@cache
def _imports(module: str) -> frozenset[str]:
    package, *_ = module.split(".")
    named = set() if module in _TABLES else set(_QUOTED.findall(source_of(module).decode()))
    if package not in _HOUSE and not _is_package(package):  # a single file, which no graph takes
        return frozenset(_graph(*_HOUSE).modules & (named | _imported_names(module)))
    graph = _graph(*dict.fromkeys((*_HOUSE, package)))
    return frozenset({*_around(module), *graph.find_modules_directly_imported_by(module), *(graph.modules & named)})


def _imported_names(module: str) -> set[str]:
    """What a file's statements import by full names: modules, and names in modules; as in the graph, not for type checkers."""
    found: set[str] = set()
    todo: list[ast.AST] = [_parsed(module)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)
    return found


def _parsed(module: str) -> ast.AST:
    try:
        return ast.parse(source_of(module))
    except (SyntaxError, ValueError) as error:
        raise InputError(f"imports of module {module} cannot be read: {error}; mend that file") from error


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
    return _without(_file(module).read_bytes(), _TABLES.get(module, ()))


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


def _without(source: bytes, names: tuple[str, ...]) -> bytes:
    """Python source without the lines that assign these variables of the module."""
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body if names else []:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id in names for target in targets):
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            lines[first:last] = [b""] * (last - first)
    return b"".join(lines)


def strings_of(module: str, known: Iterable[str]) -> list[str]:
    """Those of ``known`` that are written as strings in a module's source: the methods that an analysis is over."""
    text = source_of(module).decode()
    return [name for name in known if f'"{name}"' in text]
