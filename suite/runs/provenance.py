"""Where a number comes from: versions and git; and texts without the paths of a machine. Loads no torch."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from suite import settings

ACCURACY_PACKAGES = ("torch", "transformers", "lm_eval")
SPEED_PACKAGES = ("torch", "numba", "numba-cuda")
_MANIFEST_PACKAGES = (
    "countdown-suite", "torch", "transformers", "tokenizers", "lm_eval", "datasets", "numba", "llvmlite", "numba-cuda",
    "numpy", "scipy", "pandas", "safetensors", "gguf",
)  # fmt: skip


@cache
def version(package: str) -> str:
    """Installed version of a distribution, "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def versions(packages: Iterable[str] = _MANIFEST_PACKAGES) -> dict[str, str]:
    """Versions by distribution name."""
    return {package: version(package) for package in packages}


def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the checkout that the suite runs from; nulls outside of one."""
    root = Path(__file__).resolve().parents[2]
    if shutil.which("git") is None or not (root / ".git").exists():
        return {"commit": None, "dirty": None}

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)

    head = git("rev-parse", "HEAD")
    if head.returncode:
        return {"commit": None, "dirty": None}
    # results/ is what a run writes; it decides no number
    changes = git("status", "--porcelain", "--", ".", ":(exclude)results").stdout.strip()
    return {"commit": head.stdout.strip(), "dirty": bool(changes)}


class Scrubber:
    """Replaces folders of this machine in texts: ``{data_dir}``, ``{results_dir}``, ``{cache_dir}``, ``{model_dir}`` ...

    Parameters
    ----------
    folders : pairs of a placeholder's name and a folder or None; the longest matching folder wins.
    """

    def __init__(self, folders: Iterable[tuple[str, str | Path | None]]) -> None:
        everywhere = [
            ("cache_dir", settings.cache_dir()),
            ("hub_cache_dir", settings.hub_cache_dir()),
            ("package_dir", Path(__file__).resolve().parents[2]),
            ("work_dir", Path.cwd()),
            ("home", Path.home()),
        ]
        names: dict[str, str] = {}
        for name, folder in [*everywhere, *folders]:
            if folder is not None:
                names[os.path.abspath(folder)] = name  # noqa: PTH100  Path.absolute() keeps ".."
                if "/" in str(folder):
                    names[str(folder)] = name  # as it was written; a bare word would also match prose
        names.pop("/", None)
        self._names = dict(sorted(names.items(), key=lambda item: -len(item[0])))
        self._pattern = re.compile("|".join(rf"(?<![\w.-]){re.escape(f)}(?![\w.-])" for f in self._names))

    def text(self, text: str) -> str:
        """``text`` with known folders as placeholders."""
        return self._pattern.sub(lambda match: "{" + self._names[match.group()] + "}", text)

    def value(self, value: Any) -> Any:
        """The same for every string inside a JSON value."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(item) for key, item in value.items()}
        return [self.value(item) for item in value] if isinstance(value, (list, tuple)) else value
