"""From a plan to a loaded kernel, and launches that cost microseconds of host time.

Numba makes PTX (cached on disk between processes), the driver makes machine code of it (cached by the driver), and
``Launch`` calls the driver directly with arguments laid out once: Numba's own launch costs 30 to 127 us.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from kernels_numba.gpu.mlp.limits import shared_limit
from kernels_numba.gpu.mlp.plan import Plan

_TOOK = "// seconds to compile: "
_ENTRIES = ("kernels_numba.gpu.mlp.kernel", "kernels_numba.gpu.ptx.device")  # what `make_ptx` compiles


def cache_folder() -> Path:
    """Where PTX is kept: ``NUMBA_CACHE_DIR`` as for all of Numba's caches, else ``~/.cache/countdown-suite``."""
    root = os.environ.get("NUMBA_CACHE_DIR")
    return Path(root) / "ptx" if root else Path.home() / ".cache" / "countdown-suite" / "ptx"


def sources() -> list[Path]:
    """Files of this package that decide the PTX of a plan: those that the kernel and its device functions import."""
    import grimp

    graph = grimp.build_graph("kernels_numba", cache_dir=None, exclude_type_checking_imports=True)
    modules = {*_ENTRIES, *(module for entry in _ENTRIES for module in graph.find_upstream_modules(entry))}
    return [_file(module) for module in sorted(modules)]


def _file(module: str) -> Path:
    _, *below = module.split(".")
    path = Path(__file__).parents[2].joinpath(*below)
    return path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")


@cache
def _source_hash() -> str:
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.read_bytes())
    digest.update(f"{version('numba')} {version('numba-cuda')}".encode())
    return digest.hexdigest()


def make_ptx(plan: Plan) -> str:
    """PTX text of the plan's kernel, by Numba."""
    from numba import cuda

    from kernels_numba.gpu.mlp.kernel import SIGNATURE, make_kernel
    from kernels_numba.gpu.ptx import device

    text, _ = cuda.compile(
        make_kernel(plan, device),
        SIGNATURE,
        device=False,
        abi="numba",
        cc=plan.capability,
        output="ptx",
        launch_bounds=(plan.launch_threads, plan.resident),
    )
    return str(text)


def cached_ptx(plan: Plan) -> str:
    """``make_ptx`` with a copy on disk, keyed by the plan, the source of the kernels and the versions of Numba.

    The last line says how long Numba took, so that a compile time can be reported whoever found the text on disk.
    """
    path = _path(plan)
    if path.is_file():
        return path.read_text()
    began = time.perf_counter()
    text = make_ptx(plan)
    text += f"\n{_TOOK}{time.perf_counter() - began:.3f}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)
    return text


def compile_together(plans: Iterable[Plan], workers: int) -> None:
    """Make the PTX of several plans in ``workers`` processes; Numba compiles one kernel a process at a time, 3 to 12 s."""
    missing = [plan for plan in dict.fromkeys(plans) if not _path(plan).is_file()]
    if len(missing) > 1 and workers > 1:
        with ProcessPoolExecutor(min(workers, len(missing)), mp_context=get_context("spawn")) as pool:
            list(pool.map(cached_ptx, missing))


def _path(plan: Plan) -> Path:
    key = hashlib.sha256(f"{_source_hash()} {plan!r}".encode()).hexdigest()[:32]
    return cache_folder() / f"{key}.ptx"


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _checked(result: tuple[Any, ...], what: str) -> Any:
    error, *values = result
    if int(error) != 0:
        name = _driver().cuGetErrorName(error)[1]
        raise RuntimeError(f"{what}: {name.decode() if isinstance(name, bytes) else name} from the CUDA driver")
    return values[0] if len(values) == 1 else tuple(values)


def for_driver(text: str, cuda_version: int) -> str:
    """PTX that says a version the driver accepts; CUDA 13.0 (13000) takes PTX 9.0, and the kernels need 7.8 at most."""
    accepted = (cuda_version // 1000 - 4, cuda_version % 1000 // 10)
    found = re.search(r"\.version (\d+)\.(\d+)", text)
    if found is None or (int(found[1]), int(found[2])) <= accepted:
        return text
    return text.replace(found[0], f".version {accepted[0]}.{accepted[1]}", 1)


@dataclass(frozen=True)
class Loaded:
    """A kernel on one device: driver handle, registers of a thread, seconds to compile (when its PTX was made) and load."""

    plan: Plan
    function: Any
    registers: int
    jit_s: float


@cache
def load_kernel(plan: Plan, device: int) -> Loaded:
    """Compile and load a plan's kernel; refuses one whose blocks could not all be resident (they would hang).

    Raises
    ------
    RuntimeError
        The driver refuses the code, or ``n_blocks`` is more than the device can hold at once.
    """
    import torch

    text, driver = cached_ptx(plan.check()), _driver()
    compile_s, began = float(text.rpartition(_TOOK)[2]), time.perf_counter()
    match = re.search(r"\.visible \.entry (\S+?)\(", text)
    if match is None:
        raise RuntimeError(f"no entry in the PTX of {plan}: clear {cache_folder()}")
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # the driver calls below need torch's context
        text = for_driver(text, _checked(driver.cuDriverGetVersion(), "driver version"))
        module = _checked(driver.cuModuleLoadData(text.encode() + b"\0"), "loading a kernel")
        function = _checked(driver.cuModuleGetFunction(module, match[1].encode()), "finding the kernel")
        attribute = driver.CUfunction_attribute
        shared = plan.shared.total
        _checked(
            driver.cuFuncSetAttribute(function, attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared),
            f"asking for {shared} bytes of shared memory (limit {shared_limit(plan.capability)})",
        )
        registers = _checked(driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, function), "registers")
        per_sm = _checked(
            driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, plan.launch_threads, shared), "occupancy"
        )
    room = per_sm * torch.cuda.get_device_properties(device).multi_processor_count
    if room < plan.n_blocks:
        raise RuntimeError(f"n_blocks={plan.n_blocks}: only {room} blocks fit on device {device}; lower n_blocks")
    return Loaded(plan, function, int(registers), compile_s + time.perf_counter() - began)


@cache
def _launcher() -> Any:
    """``cuLaunchKernelEx(config, function, parameters, extra)`` of the driver library that cuda.bindings has loaded."""
    function = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuLaunchKernelEx
    function.argtypes, function.restype = [ctypes.c_void_p] * 4, ctypes.c_int
    return function


class Launch:
    """One kernel with its arguments laid out once; calling it launches on the current torch stream.

    The tensors behind the addresses must outlive this object; ``set`` changes one argument.
    """

    def __init__(self, loaded: Loaded, arguments: dict[str, int | float]) -> None:
        from kernels_numba.gpu.mlp.kernel import ARGUMENTS

        self._names = ARGUMENTS
        kinds = [ctypes.c_int64] * 13 + [ctypes.c_float, ctypes.c_int32]
        self._cells: list[Any] = [k(arguments.get(n, 0)) for n, k in zip(ARGUMENTS, kinds, strict=True)]  # type: ignore[arg-type]
        self._pointers = (ctypes.c_void_p * len(kinds))(*[ctypes.addressof(c) for c in self._cells])
        self._address = ctypes.addressof(self._pointers)
        driver, plan = _driver(), loaded.plan
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = plan.n_blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = plan.launch_threads, 1, 1
        config.sharedMemBytes = plan.shared.total
        if plan.overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        else:
            config.numAttrs = 0
        self._config, self._stream = config, 0
        # ctypes on the laid-out structs: cuda.bindings lays the configuration out again at every call (12 us, not 8)
        self._launch, self._config_at = _launcher(), int(config.getPtr())
        self._handle = int(loaded.function)

    def set(self, name: str, value: float) -> None:
        """Change one argument for the launches to come (not for graphs captured before)."""
        self._cells[self._names.index(name)].value = value

    def values(self) -> dict[str, int | float]:
        """Arguments by name, as they stand."""
        return {name: cell.value for name, cell in zip(self._names, self._cells, strict=True)}

    def __call__(self, stream: int) -> None:
        """Launch on the stream with this handle (``torch.cuda.current_stream().cuda_stream``)."""
        if stream != self._stream:
            self._config.hStream, self._stream = stream, stream
        error = self._launch(self._config_at, self._handle, self._address, None)
        if error:
            _checked((_driver().CUresult(error),), "launching a kernel")
