"""Names of methods to classes, resolved on first use; a method from anywhere is named as ``module:Class``."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from suite.errors import InputError, shown

if TYPE_CHECKING:
    from suite.methods.base import Method

# Order of every table and legend: ceiling, floor, baselines, COUNTDOWN.
METHODS: dict[str, str] = {
    "dense": "suite.methods.dense:Dense",
    "random": "suite.methods.random_mask:Random",
    "dejavu": "baselines.dejavu:DejaVu",
    "dejavu-abs": "baselines.dejavu_abs:DejaVuAbs",
    "cats": "baselines.cats:Cats",
    "m-countdown": "suite.methods.m_countdown:MCountdown",
    "d-countdown": "suite.methods.d_countdown:DCountdown",
    "s-countdown": "suite.methods.s_countdown:SCountdown",
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for a near miss, else the known names."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def method_class(name: str) -> type[Method]:
    """Class of a method by registry name or ``module:Class``.

    Raises
    ------
    InputError
        Unknown name, module that does not import, or a class that is not a Method.
    """
    target = METHODS.get(name, name)
    if ":" not in target:
        raise InputError(f"unknown method {name!r}{did_you_mean(name, METHODS)}")
    module, _, attribute = target.partition(":")
    found = getattr(_imported(module, name), attribute, None)
    if found is None:
        raise InputError(f"method {name!r} cannot be loaded: {module} has no {attribute!r}; write it as module:Class")
    from suite.methods.base import Method

    if not (isinstance(found, type) and issubclass(found, Method)):
        raise InputError(f"method {name!r} is not a subclass of suite.methods.base.Method")
    return found


def _imported(module: str, name: str) -> ModuleType:
    """A method's module; one of the user's own may do anything while it is imported, ``sys.exit`` included."""
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
        remedy = f"put the folder that holds {module} on PYTHONPATH" if missing else f"mend the module {module}"
        what = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise InputError(f"method {name!r} cannot be loaded: {what}; {remedy}") from error


def get_method(name: str, **parameters: Any) -> Method:
    """Build a method: ``get_method("m-countdown", sparsity=0.8)``.

    Raises
    ------
    InputError
        Unknown method or parameter, or a value out of range.
    """
    cls = method_class(name)
    known = list(cls.__dataclass_fields__)
    for parameter in parameters:
        if parameter not in known:
            raise InputError(f"method {name!r} has no parameter {parameter!r}{did_you_mean(parameter, known)}")
    try:
        return cls(**parameters)
    except InputError:
        raise
    except Exception as error:  # a class of the user's own may refuse its parameters in any way
        raise InputError(
            f"method {name!r} cannot be made of {shown(parameters)}: {type(error).__name__}: {error}"
        ) from error
