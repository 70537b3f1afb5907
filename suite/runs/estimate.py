"""What a run will take, before anything starts: cells cached or missing, time, memory, download, what stands in the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Protocol

import psutil

from suite import settings
from suite.devices import DTYPE_BYTES, Device
from suite.evaluation.tasks import LOCAL_TASKS, OWN_EXAMPLES
from suite.modeling.names import named_parameters
from suite.runs.cells.accuracy import AccuracyCell
from suite.runs.cells.analysis import AnalysisCell
from suite.runs.cells.matrix import Matrix, ModelCell
from suite.runs.cells.speed import TimedCell
from suite.runs.fits import FitRequest, has_fit
from suite.runs.store import CellStore, Record, canonical

if TYPE_CHECKING:
    from suite.evaluation.tasks import TaskSpec
    from suite.modeling.loading import ModelRef

# Tokens forwarded per document, all answers together (counted with SmolLM2's tokenizer), and documents of the scored
# split; only to foretell a time, so a task that is not here gets the last entry.
_TOKENS = {
    "pack_grammar": (24, 600), "pack_knowledge": (60, 200), "pack_last_word": (60, 100), "pack_generation": (60, 50),
    "decode_perplexity": (200, 30), "arc_easy": (140, 2376), "arc_challenge": (160, 1172), "winogrande": (60, 1267),
    "piqa": (100, 1838), "openbookqa": (80, 500), "hellaswag": (440, 10042), "truthfulqa_mc1": (650, 817),
    "lambada_openai": (90, 5153), "wikitext": (4700, 62), "gsm8k_cot": (3000, 1319), "": (150, 1000),
}  # fmt: skip
# Floating point operations per second that a forward pass really reaches: 360 tokens/s of a 135M model on 2 cores.
_CPU_FLOPS_PER_CORE = 5e10
_GPU_FLOPS = 1e14
_SPEED_CASE_S = 4.0  # CPU
_DECODE_CASE_S = 30.0  # CPU: 200 steps of the check three times, 120 timed, of 30 to 40 ms
_CUDA_CASE_S = 0.7  # measured on an H200: 75 s for 395 cases, and 3 minutes to compile
_OVERHEAD_BYTES = 1.5 * 2**30  # Python, torch and activations


class Models(Protocol):
    """Finds models."""

    @property
    def device(self) -> Device:
        """Device of the run."""

    def model(self, spec: str) -> ModelRef:
        """Resolve a model without loading it."""

    def model_name(self, spec: str) -> str:
        """Name of a model in the tables."""

    def speed_device(self, kind: str) -> Device | None:
        """Device that speed cases of a kind run on."""


@dataclass(frozen=True)
class Estimate:
    """What ``check`` prints."""

    n_cells: int
    n_ok: int
    n_failed: int
    n_missing: int
    seconds: float
    memory_bytes: float
    download_bytes: float
    missing: list[str] = field(default_factory=list)
    blocking: list[str] = field(default_factory=list)


def estimate(matrix: Matrix, store: CellStore, world: Models, results: Path) -> Estimate:
    """Look at every cell of a matrix without running any."""
    records = {key: store.get(key) for key in matrix.keys}
    states = [record["status"] if record else "missing" for record in records.values()]
    todo = [cell for cell in matrix.accuracy if records[cell.key] is None and not cell.problem]
    known = _known_seconds(matrix, records)
    of_models = [cell for cell in matrix.of_models if records[cell.key] is None and not cell.problem]
    seconds = sum(known.get(_like(cell)) or cell_seconds(cell, world) for cell in todo)
    seconds += sum(_analysis_seconds(cell, world) for cell in of_models if isinstance(cell, AnalysisCell))
    seconds += sum(_fit_seconds(fit, world) for fit in _missing_fits(matrix, results))
    seconds += sum(_speed_seconds(cell, world) for cell in matrix.speed if records[cell.key] is None)
    missing: list[str] = []
    blocking = list(dict.fromkeys(cell.problem for cell in matrix.of_models if cell.problem))
    download = 0.0
    for spec in dict.fromkeys(cell.model for cell in of_models):
        ref = world.model(spec)
        if ref.path is None or not ref.available:
            size = ref.size_bytes or 2 * (parameters(ref) or 0.0)
            blocked = ref.kind == "hub" and settings.hub_offline()
            (blocking if blocked else missing).append(f"model {spec}: {ref.remedy}")
            download += 0.0 if blocked else size
    memory = max((_memory(cell, world) for cell in of_models), default=0.0)
    free = world.device.memory_bytes
    if free and memory > free:
        missing.append(
            f"memory: about {memory / 2**30:.0f} GiB needed, {free / 2**30:.0f} GiB here; use a smaller dtype"
        )
    room = psutil.disk_usage(str(_existing(results))).free
    if download > room:
        missing.append(f"disk: {download / 2**30:.0f} GiB to download, {room / 2**30:.0f} GiB free")
    missing += _elsewhere(todo, matrix, world)
    n_failed = states.count("failed")
    n_missing = states.count("missing")
    n_ok = len(states) - n_failed - n_missing
    return Estimate(len(states), n_ok, n_failed, n_missing, seconds, memory, download, missing, blocking)


def _elsewhere(todo: Sequence[AccuracyCell], matrix: Matrix, world: Models) -> list[str]:
    """Data that only the hub has while it is offline, and speed cases without their GPU."""
    lines = []
    tasks = list(dict.fromkeys(cell.task.name for cell in todo if cell.task.source == "hub"))
    if tasks and settings.hub_offline():
        local = [task for task in tasks if task in LOCAL_TASKS]
        remedy = f"give --data-dir (for {', '.join(local)}), " if local else ""
        lines.append(
            f"data: {', '.join(tasks)} come from the hub, which is offline: {remedy}fill its cache while online, "
            "unless they are in it"
        )
    n_gpu = sum(cell.case.device == "cuda" for cell in matrix.speed)
    if n_gpu and world.speed_device("cuda") is None:
        lines.append(f"gpu: there is none here; {n_gpu} speed cells are recorded as skipped")
    return lines


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def _like(cell: AccuracyCell) -> str:
    """Cells that take about the same time: same model, task and batch, dense or sparse."""
    fields = cell.key_fields
    return canonical([fields["weights"], cell.dtype, cell.device, fields["task"], cell.batch_size])


def _known_seconds(matrix: Matrix, records: Mapping[str, Record | None]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {}
    for cell in matrix.accuracy:
        record = records[cell.key]
        if record is not None and record["status"] == "ok":
            seconds.setdefault(_like(cell), []).append(record["elapsed_s"])
    return {like: fmean(values) for like, values in seconds.items()}


def cell_seconds(cell: AccuracyCell, world: Models) -> float:
    """Time of one cell by its arithmetic: 2 operations per parameter and token."""
    tokens, n_documents = _TOKENS.get(cell.task.name, _TOKENS[""])
    if cell.task.limit is not None:
        n_documents = min(n_documents, cell.task.limit)
    operations = 2 * (parameters(world.model(cell.model)) or 1e9) * tokens * n_documents
    return operations / _flops(world)


def _analysis_seconds(cell: AnalysisCell, world: Models) -> float:
    """Prompts and one more pass over all tokens at full speed, decoding at a tenth of it (small batches read weights)."""
    n_tokens = cell.config.documents * (cell.config.prompt_tokens + 11 * cell.config.new_tokens)
    return 2 * (parameters(world.model(cell.model)) or 1e9) * n_tokens / _flops(world)


def _speed_seconds(cell: TimedCell, world: Models) -> float:
    if cell.case.device == "cpu":
        return _DECODE_CASE_S if cell.case.level == "decode" else _SPEED_CASE_S
    return _CUDA_CASE_S if world.speed_device("cuda") is not None else 0.0


def _flops(world: Models) -> float:
    return _GPU_FLOPS if world.device.type == "cuda" else _CPU_FLOPS_PER_CORE * (psutil.cpu_count(logical=False) or 1)


def _missing_fits(matrix: Matrix, results: Path) -> list[FitRequest]:
    return [fit for key, fit in matrix.fits.items() if not has_fit(results / "fits", key)]


def _fit_seconds(fit: FitRequest, world: Models) -> float:
    """Two passes over the text of thresholds; of a predictor three a round, and its steps.

    A predictor's matrices hold about a fifth of a layer's weights, and a step runs over them three times.
    """
    passes = 2.0 if fit.options is None else fit.options.rounds * (3.0 + 0.6 * (1 + fit.options.epochs))
    return 2 * (parameters(world.model(fit.model)) or 1e9) * fit.max_tokens * passes / _flops(world)


def parameters(ref: ModelRef) -> float | None:
    """Parameters of a model: from its name (``...-8B-...``), else from the size of its files at 2 bytes each."""
    found = named_parameters(ref.name)
    if found is not None:
        return found
    return ref.size_bytes / 2 if ref.size_bytes else None


def _memory(cell: ModelCell, world: Models) -> float:
    return (parameters(world.model(cell.model)) or 0.0) * DTYPE_BYTES[cell.dtype] * 1.1 + _OVERHEAD_BYTES


def duration(seconds: float) -> str:
    """Time for people: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe(found: Estimate, matrix: Matrix, world: Models) -> Sequence[str]:
    """Lines of ``check``."""
    lines = [
        f"device    {world.device.type} ({world.device.name})",
        f"cells     {found.n_cells}: {len(matrix.accuracy)} accuracy, {len(matrix.speed)} speed"
        + (f", {len(matrix.analysis)} analysis" if matrix.analysis else ""),
        f"          {found.n_ok} cached, {found.n_missing} missing, {found.n_failed} failed",
    ]
    if found.n_failed:
        lines.append("          failed cells run again with --rerun failed")
    for spec in dict.fromkeys(cell.model for cell in matrix.of_models):
        ref = world.model(spec)
        state = "ready" if ref.available and ref.path is not None else "not on disk"
        lines.append(f"model     {world.model_name(spec)} ({ref.kind}): {state}")
    for task in _tasks(matrix):
        limit = "all documents" if task.limit is None else f"{task.limit} documents"
        lines.append(f"task      {task.name}: {limit}, data from {task.source}{_shots(task)}{_chat(task)}")
    lines.append(
        f"estimate  about {duration(found.seconds)}, {found.memory_bytes / 2**30:.1f} GiB of memory, "
        f"{found.download_bytes / 2**30:.1f} GiB to download"
    )
    lines += [f"missing   {line}" for line in (*found.missing, *found.blocking)]
    return lines


def _shots(task: TaskSpec) -> str:
    """Where few-shot examples come from, as far as the files tell; the rows say it for every task."""
    if not task.num_fewshot:
        return ""
    split = next((name for name in ("train", "validation", "test") if name in task.files), None)
    if task.source != "data_dir" or split is None or task.name in OWN_EXAMPLES:
        return f", {task.num_fewshot} examples from where the task's YAML says (column fewshot_split)"
    scored = " (scored; the document itself is left out)" if split == list(task.files)[-1] else ""
    return f", {task.num_fewshot} examples from {split}{scored}"


def _chat(task: TaskSpec) -> str:
    template = ", in the model's chat template" if task.chat.get("apply_chat_template") else ""
    return template + (", with a system instruction" if "system_instruction" in task.chat else "")


def _tasks(matrix: Matrix) -> list[TaskSpec]:
    return list(
        {canonical(cell.key_fields["task"]): cell.task for cell in matrix.accuracy if not cell.problem}.values()
    )
