"""The one place where environment variables are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from kernels_numba import OPENMP_TOO_LATE
from suite.errors import InputError

_YES = {"1", "on", "yes", "true"}


def _folder(variable: str, default: Callable[[], Path]) -> Path:
    """Folder that a variable names; the default is asked for only without one: not every user has a home."""
    value = os.environ.get(variable, "")
    try:
        return Path(value).expanduser().absolute() if value else default()
    except RuntimeError as error:
        raise InputError(f"this user has no home folder: set {variable} to a full path") from error


def cache_dir() -> Path:
    """Folder of converted models and other derived files: ``COUNTDOWN_CACHE``, else ``~/.cache/countdown-suite``.

    Not created here.
    """
    return _folder("COUNTDOWN_CACHE", lambda: Path.home() / ".cache" / "countdown-suite")


def results_dir() -> Path:
    """Folder of cells, fits and runs: ``COUNTDOWN_RESULTS``, else ``results`` where one stands; not made here."""
    return _folder("COUNTDOWN_RESULTS", lambda: Path.cwd() / "results")


def hub_cache_dir() -> Path:
    """Hugging Face's cache of downloads, by its own rule: ``HF_HUB_CACHE``, else ``HF_HOME/hub``."""

    def hf_home() -> Path:
        return _folder("XDG_CACHE_HOME", lambda: Path.home() / ".cache") / "huggingface"

    return _folder("HF_HUB_CACHE", lambda: _folder("HF_HOME", hf_home) / "hub")


def hub_offline() -> bool:
    """Whether Hugging Face's switches ``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE`` forbid downloads."""
    return any(os.environ.get(name, "").lower() in _YES for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def package_dir() -> Path:
    """Folder that the suite is imported from: of a checkout its root."""
    return Path(__file__).resolve().parents[1]


def openmp_policy() -> str:
    """How idle threads shall wait: ``OMP_WAIT_POLICY``, which `kernels_numba` sets."""
    return os.environ.get("OMP_WAIT_POLICY", "")


def openmp_waiting() -> str:
    """How idle threads wait: the policy, and ``(late)`` where OpenMP was loaded before it was set.

    A key field of times on a CPU: no message, and no name of a library.
    """
    return openmp_policy() + (" (late)" if OPENMP_TOO_LATE else "")
