"""The matrix of a run as data: pydantic models of the YAML, its reading, and overrides from the command line.

Paths in the YAML (data_dir, include_path, a model's folder or file, ``file:PATH`` of a calibration) are relative to the
working folder, as on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from suite.devices import Dtype
from suite.errors import InputError, shown
from suite.evaluation.chat import ChatSettings
from suite.evaluation.tasks import need_data_folder
from suite.fitting.calibration import Calibration
from suite.fitting.options import Loss, Predictor, PredictorEstimator, PredictorOptions, Schedule, Start
from suite.matrix_file import read_yaml
from suite.methods.base import PredictorInput
from suite.registry import did_you_mean

DATA_DIR = "{data_dir}"  # in a calibration's source: the data folder given on the command line
PROFILES = ("embedded", "small", "paper", "gpu-kernels", "gpu-accuracy", "gpu-decode")

MOST_DIGITS = 18  # of a whole number on the command line
Sparsity = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, strict=True)]
_MOST = 2**63 - 1  # what torch and numpy take
Count = Annotated[int, Field(ge=1, le=_MOST, strict=True)]
# tokens of a sequence, in which memory grows before a model is asked: far above any context there is
Length = Annotated[int, Field(ge=1, le=2**24, strict=True)]
Seed = Annotated[int, Field(ge=0, le=_MOST, strict=True)]
Scope = Literal["paper", "scored", "all"]
Estimator = Literal["calibrated", "mean-kth", "pooled-quantile"]


class Section(BaseModel):
    """A part of the YAML: frozen, and an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    hint = did_you_mean(str(key), cls.model_fields)
                    raise PydanticCustomError("unknown_key", "unknown key '{key}'{hint}", {"key": key, "hint": hint})
        return data


class ModelConfig(Section):
    """A model: ``embedded``, a hub id, a folder or a .gguf file; ``dtype`` it is loaded in."""

    id: str = Field(min_length=1)
    dtype: Dtype = "float32"


class MethodConfig(Section):
    """A method by registry name or ``module:Class``, with parameters besides its sparsity."""

    name: str = Field(min_length=1)
    params: dict[str, Any] = {}

    @field_validator("params")
    @classmethod
    def _no_sparsity(cls, params: dict[str, Any]) -> dict[str, Any]:
        if "sparsity" in params:
            raise PydanticCustomError("sparsity_param", "sparsity is set by the block's sparsities, not by params")
        return params


class TaskConfig(Section, ChatSettings):
    """A task; ``limit`` None runs all documents, ``num_fewshot`` None the task's own; options: ``resolve_task``."""

    name: str = Field(min_length=1)
    source: Literal["auto", "pack", "data_dir", "hub", "include", "text"] = "auto"
    limit: Count | None = None
    num_fewshot: Annotated[int, Field(ge=0, le=_MOST, strict=True)] | None = None
    options: dict[str, Any] = {}


class CalibrationConfig(Section):
    """Text that thresholds are fitted on (``pydoc`` or ``file:PATH``), at most ``max_tokens``, and the estimators."""

    source: str = "pydoc"
    max_tokens: Count = 4096
    estimators: list[Estimator] = Field(default=["calibrated"], min_length=1)


class PredictorConfig(Section):
    """Predictors of d-countdown, s-countdown and Deja Vu: kinds x ranks x estimators x sources, and how they are trained.

    ``sources`` and ``max_tokens``: their text, ``calibration.source`` if none is named. A rank of null is
    min(512, d_model // 2). ``activation_budget_gib``: memory for activations, by default half of what is free; it decides
    no number. The rest as in :class:`suite.fitting.options.PredictorOptions`.
    """

    predictors: list[Predictor] = Field(default=["low-rank"], min_length=1)
    ranks: list[Count | None] = Field(default=[None], min_length=1)
    estimators: list[PredictorEstimator] = Field(default=["calibrated"], min_length=1)
    sources: list[str] = []
    max_tokens: Count = 100_000
    epochs: Annotated[int, Field(ge=0, le=_MOST, strict=True)] = PredictorOptions.epochs
    loss: Loss = PredictorOptions.loss
    pos_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = PredictorOptions.pos_weight
    start: Start = PredictorOptions.start
    schedule: Schedule = PredictorOptions.schedule
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = PredictorOptions.learning_rate
    batch_tokens: Count = PredictorOptions.batch_tokens
    rounds: Count = PredictorOptions.rounds
    predictor_inputs: list[PredictorInput] = Field(default=["mlp"], min_length=1)
    activation_budget_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    def options(self) -> list[PredictorOptions]:
        """Every kind with every rank and every input that it has."""
        names = ("epochs", "loss", "pos_weight", "start", "schedule", "learning_rate", "batch_tokens", "rounds")
        training = {name: getattr(self, name) for name in names}
        found = []
        for predictor in self.predictors:
            inputs: list[PredictorInput] = self.predictor_inputs if predictor == "gated" else ["mlp"]
            for rank, read in product(self.ranks if predictor != "ternary" else [None], inputs):
                found.append(PredictorOptions(predictor=predictor, rank=rank, predictor_input=read, **training))
        return found


def _named(items: Any) -> Any:
    """Let a list of sections be written as bare names."""
    return [{"name": item} if isinstance(item, str) else item for item in items] if isinstance(items, list) else items


class AccuracyBlock(Section):
    """Cells of quality: methods x modes x sparsities x scopes x tasks; dense runs once per model and task.

    ``fit_seeds`` and ``fit_sources``: seeds and texts of this block's fits in place of the matrix' own, which still
    decide the documents and the main rows; what differs in them alone is shown beside the main rows, on equal documents.
    ``predictors``: kinds of this block's predictors in place of the matrix' own. ``min_parameters``, ``max_parameters``:
    the block is for models of so many parameters by their names, the second excluded; a name without a size says 0.
    """

    methods: list[MethodConfig] = Field(min_length=1)
    modes: list[Literal["ideal", "practical"]] = Field(default=["ideal"], min_length=1)
    sparsities: list[Sparsity] = Field(min_length=1)
    scopes: list[Scope] = Field(default=["scored"], min_length=1)
    tasks: list[TaskConfig] = Field(min_length=1)
    fit_seeds: list[Seed] = []
    fit_sources: list[str] = []
    predictors: list[Predictor] = []
    min_parameters: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    max_parameters: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @field_validator("methods", "tasks", mode="before")
    @classmethod
    def _bare_names(cls, items: Any) -> Any:
        return _named(items)


class SpeedBlock(Section):
    """Cells of speed: shapes x methods x sparsities x dtypes x backends x batch sizes x threads (x contexts of decode).

    ``predictors`` and ``predictor_inputs``: of methods that have a predictor, and what gated ones read; without, those of the
    matrix that are timed (low-rank if none is), on the MLP's input.
    """

    level: Literal["op", "layer", "decode"] = "layer"
    shapes: list[str] = Field(min_length=1)
    methods: list[MethodConfig] = Field(min_length=1)
    sparsities: list[Sparsity] = Field(min_length=1)
    dtypes: list[Dtype] = Field(default=["float32"], min_length=1)
    backends: list[Literal["torch", "numba-cpu", "numba-cuda"]] = Field(default=["torch", "numba-cpu"], min_length=1)
    batch_sizes: list[Count] = Field(default=[1], min_length=1)
    threads: list[Count | Literal["all"]] = Field(default=["all"], min_length=1)
    variants: list[Literal["eager", "graph", "compile", "generate", "no-overlap", "deterministic", "trace"]] = Field(
        default=["eager"], min_length=1
    )
    clocks: list[Literal["wall", "event", "graph"]] = Field(default=["wall"], min_length=1)
    contexts: list[Count] = Field(default=[128], min_length=1)
    predictors: list[Literal["low-rank", "gated"]] = []
    predictor_inputs: list[PredictorInput] = Field(default=["mlp"], min_length=1)

    @field_validator("methods", mode="before")
    @classmethod
    def _bare_names(cls, items: Any) -> Any:
        return _named(items)


class AnalysisConfig(Section):
    """Coefficients of tokens that each model generates densely after the first tokens of so many documents of a text."""

    text: str = "decode_perplexity"
    documents: Count = 8
    prompt_tokens: Length = 32
    new_tokens: Length = 32
    sparsities: list[Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False, strict=True)]] = Field(
        default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], min_length=1
    )


class MatrixConfig(Section):
    """A whole matrix: what a run measures."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    title: str = ""
    models: list[ModelConfig] = []
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seeds: list[Seed] = Field(default=[0], min_length=1)
    batch_size: Count = 8
    data_dir: str | None = None
    include_path: str | None = None
    calibration: CalibrationConfig = CalibrationConfig()
    predictor: PredictorConfig = PredictorConfig()
    accuracy: list[AccuracyBlock] = []
    speed: list[SpeedBlock] = []
    analysis: AnalysisConfig | None = None

    @model_validator(mode="after")
    def _means_something(self) -> MatrixConfig:
        if not self.accuracy and not self.speed and self.analysis is None:
            raise PydanticCustomError("empty", "empty matrix: give at least one block under accuracy or speed")
        if self.accuracy and not self.models:
            raise PydanticCustomError("empty", "accuracy blocks need at least one model under models")
        if self.analysis is not None and not self.models:
            raise PydanticCustomError("empty", "analysis needs at least one model under models")
        if any(block.max_parameters and block.min_parameters >= block.max_parameters for block in self.accuracy):
            raise PydanticCustomError("empty", "min_parameters of a block: not below its max_parameters, for no model")
        kinds = {*self.predictor.predictors, *(kind for block in self.accuracy for kind in block.predictors)}
        if "block" in self.predictor.predictor_inputs and "gated" not in kinds:
            raise PydanticCustomError("unread", "predictor_inputs block: only gated predictors read it; name them too")
        return self


def profile_path(name: str) -> Path:
    """File of a profile that ships with the package.

    Raises
    ------
    InputError
        Unknown profile.
    """
    if name not in PROFILES:
        raise InputError(f"unknown profile {name!r}{did_you_mean(name, PROFILES)}")
    return Path(str(resources.files("suite") / "configs" / f"{name}.yaml"))


def load_config(source: str | Path) -> MatrixConfig:
    """Matrix of a YAML file, or of a profile by its name.

    Raises
    ------
    InputError
        One line with file, key path, value and remedy.
    """
    path = profile_path(str(source)) if str(source) in PROFILES else Path(source)
    if not path.suffix and not _exists(path):
        raise InputError(f"no matrix file and no profile {shown(str(source))}{did_you_mean(str(source), PROFILES)}")
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise InputError(
            f"matrix file {path}: must be a mapping of keys such as name, models, accuracy; it is "
            f"{'empty' if data is None else type(data).__name__}"
        )
    return build_config(data, str(path))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for any file
        return False


def build_config(data: Mapping[str, Any], place: str) -> MatrixConfig:
    """Check a mapping; ``place`` (file or "command line") starts the message of an InputError."""
    try:
        return MatrixConfig.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{place}: {_one_line(error.errors())}") from error


def _one_line(errors: list[ErrorDetails]) -> str:
    first = errors[0]
    message = first["msg"].replace("Input should be", "must be").replace("\n", " ")
    value = ""
    if first["type"] == "missing":
        message = "is missing"
    elif first["type"] == "too_short":
        message = "must not be empty"
    elif first["type"] == "list_type":
        message = "must be a list, as in [a, b]"
    elif (
        first["loc"][:1] in (("accuracy",), ("speed",))
        and first["type"] in ("less_than", "greater_than_equal")
        and ("sparsities" in first["loc"])
    ):
        message = "must be in [0, 1), the share of neurons that is not used"
    elif first["type"] == "string_pattern_mismatch":
        message = "must be letters, digits, '.', '_' or '-', starting with a letter or digit"
    if not isinstance(first["input"], (dict, list, MatrixConfig)):
        value = f", got {shown(first['input'])}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    path = ".".join(str(part) for part in first["loc"] if part != "constrained-int")
    return f"{path + ': ' if path else ''}{message}{value}{more}"


def override(
    config: MatrixConfig,
    *,
    models: list[str] | None = None,
    only: str | None = None,
    limit: str | None = None,
    calibration: str | None = None,
    **values: Any,
) -> MatrixConfig:
    """Change a matrix from the command line.

    Parameters
    ----------
    models : replace the matrix' models; ``ID`` or ``ID=DTYPE`` each.
    only : ``accuracy`` or ``speed``.
    limit : documents a task, a whole number, or ``none`` for all.
    calibration : text of thresholds and predictors, but where a block names ``fit_sources`` of its own.
    values : ``data_dir``, ``include_path``, ``device``, ``seeds``, ``batch_size``, and of the predictors ``ranks``
        and ``activation_budget_gib``; None leaves the matrix' own.

    Raises
    ------
    InputError
        A value that the matrix does not take.
    """
    data = config.model_dump()
    for key, value in values.items():
        if value is not None:
            (data["predictor"] if key in PredictorConfig.model_fields else data)[key] = value
    if calibration is not None:
        Calibration(calibration)  # an unknown kind is refused, also by a matrix that fits nothing
        data["calibration"]["source"], data["predictor"]["sources"] = calibration, []
    folder = data["data_dir"]
    if folder is not None:
        need_data_folder(folder)
    data["calibration"]["source"] = _with_data_dir(data["calibration"]["source"], folder)
    data["predictor"]["sources"] = [_with_data_dir(source, folder) for source in data["predictor"]["sources"]]
    for block in data["accuracy"]:
        block["fit_sources"] = [_with_data_dir(source, folder) for source in block["fit_sources"]]
    data["models"] = [model.model_dump() for model in models_of(config, models)]
    if only is not None:
        if only not in ("accuracy", "speed"):
            raise InputError(f"--only {only!r}: must be accuracy or speed")
        other = "speed" if only == "accuracy" else "accuracy"
        data[other] = []
        data["analysis"] = None  # neither an accuracy nor a speed
        if not data[only]:
            raise InputError(f"--only {only}: matrix {config.name!r} has no {only} block")
    if limit is not None:
        for block in data["accuracy"]:
            for task in block["tasks"]:
                task["limit"] = _limit(limit)
    return build_config(data, "command line")


def _with_data_dir(source: str, folder: str | None) -> str:
    """A calibration's source with its folder of data: ``{data_dir}``, or tasks named after ``train:``."""
    kind, _, rest = source.partition(":")
    if kind == "train":
        rest = ",".join(
            name if "/" in name else f"{DATA_DIR}/{name.strip()}" for name in rest.split(",") if name.strip()
        )
        source = f"{kind}:{rest}"
    if DATA_DIR not in source:
        return source
    if folder is None:
        raise InputError(f"calibration {source}: needs the data folder: give --data-dir")
    return source.replace(DATA_DIR, str(folder))


def models_of(config: MatrixConfig, specs: list[str] | None) -> list[ModelConfig]:
    """Models of a matrix, or those that are named instead, ``ID`` or ``ID=DTYPE`` each."""
    if not specs:
        return config.models
    dtype = config.models[0].dtype if config.models else "float32"
    data = []
    for spec in specs:
        name, equals, given = spec.rpartition("=")
        is_path = "/" in given or _exists(Path(spec).expanduser())  # models/lr=1e-3/final
        data.append({"id": name, "dtype": given} if equals and not is_path else {"id": spec, "dtype": dtype})
    return build_config({**config.model_dump(), "models": data}, "command line").models


def _limit(text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not text.isdecimal() or len(text) > MOST_DIGITS or int(text) < 1:
        raise InputError(f"--limit {shown(text)}: must be a whole number of documents, at least 1, or none for all")
    return int(text)
