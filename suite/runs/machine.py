"""What this machine has, of which keys of cells are made: models, data, versions, code, device. Loads no torch."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from suite import devices, settings
from suite.code import ANALYSIS, cell_hash, strings_of
from suite.config import MatrixConfig, TaskConfig
from suite.decoding.shapes import has_weights
from suite.devices import Device
from suite.errors import InputError
from suite.evaluation.groups import Expansion, Group, expand_name
from suite.evaluation.tasks import data_fingerprint, resolve_task
from suite.registry import METHODS

if TYPE_CHECKING:
    from suite.evaluation.tasks import TaskSpec
    from suite.fitting.calibration import Calibration
    from suite.modeling.loading import ModelRef
    from suite.runs.fits import FitRequest
    from suite.runs.store import CellStore, Record

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
    root = settings.package_dir()
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


class LocalWorld:
    """Answers for one matrix on this machine; every answer is computed once.

    Parameters
    ----------
    config : MatrixConfig

    Raises
    ------
    InputError
        ``device: cuda`` where there is none.
    """

    def __init__(self, config: MatrixConfig) -> None:
        self.config = config
        self.device = devices.device(config.device)
        self.model = cache(self._model)
        self.weights = cache(self._weights)
        self._names = cache(self._distinct_names)
        self.calibration = cache(self._calibration)
        self.calibration_fingerprint = cache(lambda source, tokens: self.calibration(source, tokens).fingerprint())
        self._expansion = cache(expand_name)
        self._data: dict[str, str] = {}

    def _model(self, spec: str) -> ModelRef:
        from suite.modeling.loading import resolve_model

        return resolve_model(spec)

    def _weights(self, spec: str) -> str:
        from suite.modeling.loading import weights_fingerprint

        return weights_fingerprint(self.model(spec))

    def _calibration(self, source: str, max_tokens: int) -> Calibration:
        from suite.fitting.calibration import Calibration

        return Calibration(source, max_tokens)

    def prepare(self, spec: str, say: Callable[[str], None]) -> None:
        """Download or convert a model once, before its weights go into keys.

        Raises
        ------
        InputError
            The model cannot be loaded.
        """
        ref = self.model(spec)
        if ref.path is None or not ref.available:
            from suite.modeling.loading import prepare_model

            say(f"preparing model {spec}")
            prepare_model(ref, say)
            self.model.cache_clear()

    def speed_device(self, kind: str) -> Device | None:
        """Device that speed cases of a kind run on, whatever the device of the accuracy cells; None if there is none."""
        return devices.cpu() if kind == "cpu" else devices.gpu()

    def openmp_waiting(self) -> str:
        """How this process's threads wait for work."""
        return settings.openmp_waiting()

    def model_name(self, spec: str) -> str:
        """Short name of a model for the tables, which no other model of the matrix has."""
        return self._names()[spec]

    def _distinct_names(self) -> dict[str, str]:
        from suite.modeling.names import distinct_names

        timed = [shape for block in self.config.speed for shape in block.shapes if has_weights(shape)]
        return distinct_names([self.model(spec) for spec in [*(m.id for m in self.config.models), *timed]])

    def members(self, tasks: Sequence[TaskConfig]) -> list[TaskConfig]:
        """Tasks with every group, tag and pattern replaced by its tasks; what a group has in common with them once."""
        found: list[TaskConfig] = []
        for task in tasks:
            try:
                leaves = self._expand(task).tasks
            except InputError:  # which `task` raises again, for this task alone
                found.append(task)
                continue
            for leaf in leaves:
                shots = leaf.num_fewshot if task.num_fewshot is None else task.num_fewshot
                one = task.model_copy(update={"name": leaf.name, "num_fewshot": shots})
                if leaf.name == task.name or one not in found:
                    found.append(one)
        return found

    def groups(self, task: TaskConfig) -> Sequence[Group]:
        """Groups that a name stands for, those inside it included; none of a name that is wrong, which `task` says."""
        try:
            return self._expand(task).groups
        except InputError:
            return ()

    def _expand(self, task: TaskConfig) -> Expansion:
        return self._expansion(task.name, None if task.source == "hub" else self.config.include_path)

    def task(self, task: TaskConfig) -> TaskSpec:
        """Find a task's data; a source that was asked for must be where it is found."""
        self._expand(task)  # says what is wrong with a group
        local = task.source != "hub"
        spec = resolve_task(
            task.name,
            data_dir=self.config.data_dir if local else None,
            include_path=self.config.include_path if local else None,
            num_fewshot=task.num_fewshot,
            limit=task.limit,
            options=task.options,
            chat=task.chat(task.name),
        )
        if task.source not in ("auto", spec.source):
            remedy = {"data_dir": "give --data-dir", "include": "give --include-path"}.get(
                task.source, "use source auto"
            )
            raise InputError(f"task {task.name!r}: source {task.source!r} wanted, found in {spec.source!r}; {remedy}")
        return spec

    def data(self, task: TaskSpec) -> str:
        """Fingerprint of a task's data."""
        name = repr((task.name, task.source, sorted(task.files.items())))
        if name not in self._data:
            self._data[name] = data_fingerprint(task)
        return self._data[name]

    def fit_key(self, request: FitRequest) -> str:
        """Key of a fit."""
        from suite.fitting.keys import key_of, predictor_key, training_key
        from suite.registry import get_method

        method = get_method(request.method, sparsity=request.sparsity, **request.params)
        decided_by = (
            self.weights(request.model),
            self.calibration_fingerprint(request.calibration, request.max_tokens),
            request.max_tokens,
            request.seed,
            request.dtype,
        )
        if request.options is not None:
            return predictor_key(training_key(method, request.options, *decided_by), request.estimator)
        return key_of(method, request.estimator, *decided_by)

    def versions(self, kind: str) -> dict[str, str]:
        """Packages that decide numbers of a kind."""
        return versions(ACCURACY_PACKAGES if kind == "accuracy" else SPEED_PACKAGES)

    def code(self, kind: str, method: str) -> str:
        """Hash of the code that decides numbers of a kind, a method of the user's own included."""
        # an analysis is over all methods that its module names
        methods = [method] if method else strings_of(ANALYSIS, METHODS)
        targets = [METHODS.get(name, name).partition(":") for name in methods]
        return cell_hash(kind, tuple(module for module, colon, _ in targets if colon))


class StoredWorld(LocalWorld):
    """The same for cells that another machine has measured: device, versions and code are its newest cells'.

    Models and data are this machine's own, so that a cell of other weights or documents is not found.

    Raises
    ------
    InputError
        The store has no cell.
    """

    def __init__(self, config: MatrixConfig, store: CellStore) -> None:
        super().__init__(config.model_copy(update={"device": "cpu"}))
        records = store.records()
        # of every kind and method, "" where a kind has none
        self._newest = {(str(r["kind"]), str(r["key_fields"].get("method", ""))): r for r in records}
        # of the speed cells on a CPU alone, whichever device the newest is of
        waiting = [fields["openmp_waiting"] for r in records if "openmp_waiting" in (fields := r["key_fields"])]
        self._waiting = str(waiting[-1]) if waiting else super().openmp_waiting()
        newest = self._newest_of("accuracy") or self._newest_of("speed")
        if newest is None:
            raise InputError(f"no cell below {store.folder}: copy the store of the machine that measured, or run")
        kind = newest["key_fields"]["device"]
        self.device = Device(kind, "as in the cells, whose store was carried over")

    def speed_device(self, kind: str) -> Device | None:
        """Device of the newest speed cell, if it is of this kind."""
        newest = self._newest_of("speed")
        fields = newest["key_fields"] if newest else {}
        if fields.get("device") != kind:
            return super().speed_device(kind)
        return Device(fields["device"], fields["device_name"], fields["driver_version"])

    def openmp_waiting(self) -> str:
        """How the threads waited that the newest speed cell of a CPU was timed with."""
        return self._waiting

    def _newest_of(self, kind: str) -> Record | None:
        records = [record for (one, _), record in self._newest.items() if one == kind]
        return max(records, key=lambda record: str(record["created"]), default=None)

    def versions(self, kind: str) -> dict[str, str]:
        """Packages that the cells were measured with."""
        newest = self._newest_of(kind)
        return dict(newest["key_fields"]["versions"]) if newest else super().versions(kind)

    def code(self, kind: str, method: str) -> str:
        """Hash of the code that the method's cells were measured by."""
        newest = self._newest.get((kind, method))
        return str(newest["key_fields"]["code"]) if newest else super().code(kind, method)
