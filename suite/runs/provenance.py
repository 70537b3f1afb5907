"""Where a number comes from: versions, git, device; and texts without the paths of a machine. Loads no torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psutil

from suite import settings
from suite.errors import InputError

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


@dataclass(frozen=True)
class Device:
    """The device that a run uses; ``driver`` is "" on a CPU."""

    type: Literal["cpu", "cuda"]
    name: str
    driver: str = ""
    memory_bytes: int = 0


@cache
def cpu() -> Device:
    """Name of the processor and the memory of the machine."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        name = found.group(1).strip() if found else name
    return Device("cpu", name, memory_bytes=psutil.virtual_memory().total)


@cache
def gpu() -> Device | None:
    """First NVIDIA GPU that PyTorch could use, from nvidia-smi (importing torch takes 3 s); None if there is none."""
    if shutil.which("nvidia-smi") is None or "+cpu" in version("torch"):
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    found = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    lines = found.stdout.strip().splitlines()
    if found.returncode or not lines:
        return None
    name, driver, memory = (part.strip() for part in lines[0].split(","))
    mebibytes = float(memory) if memory.replace(".", "").isdigit() else 0.0
    return Device("cuda", name, driver, int(mebibytes * 2**20))


def device(wanted: str) -> Device:
    """Device for ``auto``, ``cpu`` or ``cuda``.

    Raises
    ------
    InputError
        ``cuda`` where there is none.
    """
    found = None if wanted == "cpu" else gpu()
    if wanted == "cuda" and found is None:
        why = "PyTorch is a CPU build" if "+cpu" in version("torch") else "nvidia-smi shows no GPU"
        raise InputError(f"device cuda: there is none here ({why}); use device cpu or auto")
    return found or cpu()


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
