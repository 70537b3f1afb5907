"""COUNTDOWN-suite: benchmark and reproducibility suite for COUNTDOWN (arXiv 2505.17701) and its baselines."""

from __future__ import annotations

import importlib
from typing import Any

import kernels_numba  # noqa: F401  sets how OpenMP's threads wait, which must be before torch is loaded

__version__ = "0.1.0"

# Lazy, so that importing the package loads no torch.
_PUBLIC = {
    "get_method": "suite.registry",
    "load_model": "suite.modeling.loading",
    "attach": "suite.modeling.attach",
    "fit": "suite.fitting.api",
    "evaluate": "suite.evaluation.evaluator",
    "benchmark": "suite.speed.bench",
    "load_results": "suite.report.results",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'suite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
