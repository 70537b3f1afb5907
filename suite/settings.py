"""The one place where environment variables are read."""

from __future__ import annotations

import os
from pathlib import Path

_YES = {"1", "on", "yes", "true"}


def _folder(variable: str, default: Path) -> Path:
    value = os.environ.get(variable, "")
    return Path(value).expanduser().absolute() if value else default


def cache_dir() -> Path:
    """Folder of converted models and other derived files: ``COUNTDOWN_CACHE``, else ``~/.cache/countdown-suite``.

    Not created here.
    """
    return _folder("COUNTDOWN_CACHE", Path.home() / ".cache" / "countdown-suite")


def results_dir() -> Path:
    """Folder of cells, fits and runs: ``COUNTDOWN_RESULTS``, else ``results`` where one stands; not made here."""
    return _folder("COUNTDOWN_RESULTS", Path.cwd() / "results")


def hub_cache_dir() -> Path:
    """Hugging Face's cache of downloads, by its own rule: ``HF_HUB_CACHE``, else ``HF_HOME/hub``."""
    xdg = _folder("XDG_CACHE_HOME", Path.home() / ".cache")
    return _folder("HF_HUB_CACHE", _folder("HF_HOME", xdg / "huggingface") / "hub")


def hub_offline() -> bool:
    """Whether Hugging Face's switches ``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE`` forbid downloads."""
    return any(os.environ.get(name, "").lower() in _YES for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
