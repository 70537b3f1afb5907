"""What numbers are made on and of: the devices of this machine, and the types of a model's weights. Loads no torch."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import psutil

from suite.errors import InputError

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]  # names of torch's own types
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


def torch_dtype(name: str) -> torch.dtype:
    """Torch's type of a name in `DTYPES`."""
    import torch  # late: 3 s

    found: torch.dtype = getattr(torch, name)
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Name of one of torch's types, without the module."""
    return str(dtype).removeprefix("torch.")


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
    if shutil.which("nvidia-smi") is None or _torch_is_cpu_build():
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
        why = "PyTorch is a CPU build" if _torch_is_cpu_build() else "nvidia-smi shows no GPU"
        raise InputError(f"device cuda: there is none here ({why}); use device cpu or auto")
    return found or cpu()


def _torch_is_cpu_build() -> bool:
    return "+cpu" in importlib.metadata.version("torch")
