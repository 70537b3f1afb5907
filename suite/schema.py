"""Tables of a run folder: columns with kind, role and unit, which rows are the same, their order, how cells are read and written.

What the columns mean is explained in results/README.md, section by section in the same order (a test).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

SCHEMA_VERSION = 3  # of a run folder; folders of older ones are read as well

# number: a float, written with 10 digits; exact: with all; count: a whole number that is counted or a size;
# whole: a whole number that names a setting; listed: a text whose rows stay in the order in which they were made
Kind = Literal["text", "listed", "flag", "number", "exact", "count", "whole"]
# origin: which run, cell or machine; setting: of model, method and fit, or the part of a cell that a row is of; task: what
# was asked; fact: follows from these or may not change a number; derived: from other columns
Role = Literal["origin", "setting", "task", "fact", "measured", "derived", "status"]
Row = TypeVar("Row", bound=Mapping[str, Any])


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Parameters
    ----------
    since : schema version that brought it
    before : its text in the rows of older folders
    """

    name: str
    kind: Kind
    role: Role
    unit: str = ""
    since: int = 1
    before: str = ""

    @property
    def is_number(self) -> bool:
        """Whether readers calculate with it; a whole number that names a setting is a name."""
        return self.kind in ("number", "exact", "count")

    def parse(self, text: str) -> Any:
        """Value of a cell: None where it is empty, but for a text.

        Raises
        ------
        ValueError
            It is not of the column's kind.
        """
        if self.kind in ("text", "listed"):
            return text
        if not text:
            return None
        value: Any = {"true": True, "false": False}.get(text) if self.kind == "flag" else float(text)
        if self.kind in ("count", "whole"):
            value = int(value) if value.is_integer() else None
        if value is None:
            raise ValueError(f"{text!r} is not {'true or false' if self.kind == 'flag' else 'a whole number'}")
        return value

    def text(self, value: Any) -> str:
        """Text of a cell: the same on every machine."""
        if self.kind == "exact" and value is not None:
            return repr(float(value))
        return cell_text(value)


def cell_text(value: Any) -> str:
    """Text of a CSV cell: empty for None, 10 significant digits for floats, the same on every machine."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return format(value, ".10g") if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Table:
    """A file of a run folder.

    Parameters
    ----------
    file : its name
    columns : in the order of the file
    first : names of the columns that rows are sorted by before all others of the identity
    """

    file: str
    columns: tuple[Column, ...]
    first: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the file without its suffixes."""
        return self.file.partition(".")[0]

    @cached_property
    def names(self) -> list[str]:
        """Names of the columns."""
        return [column.name for column in self.columns]

    @cached_property
    def settings(self) -> tuple[str, ...]:
        """Columns that tell settings of a task apart, or the rows of a cell."""
        return self._of("setting")

    @cached_property
    def identity(self) -> tuple[str, ...]:
        """Columns that tell rows apart, in any run: settings, and what was asked."""
        return self._of("setting", "task")

    @cached_property
    def named(self) -> tuple[str, ...]:
        """Columns that a cell's key decides: its identity and what follows from it."""
        return self._of("setting", "task", "fact")

    def _of(self, *roles: Role) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns if column.role in roles)

    def since(self, version: int) -> list[str]:
        """Columns that folders of a schema version must have."""
        return [column.name for column in self.columns if column.since <= version]

    def column(self, name: str) -> Column:
        """Column of a name."""
        return self.columns[self.names.index(name)]

    def key(self, row: Mapping[str, str]) -> tuple[str, ...]:
        """What tells a row of the file from all others; a column that the file lacks is as in older folders."""
        return tuple(row.get(name, self.column(name).before) for name in self.identity)

    def sorted(self, rows: Iterable[Row]) -> list[Row]:
        """Rows by identity, numbers as numbers, then by cell; never by what was measured."""
        last = ("cell_id",) if "cell_id" in self.names else ()
        order = dict.fromkeys((*self.first, *self.identity, *last))
        names = [name for name in order if self.column(name).kind != "listed"]

        def key(row: Row) -> list[tuple[int, float, str]]:
            values = [row.get(name) for name in names]
            return [
                (0, float(v), "") if isinstance(v, (int, float)) and not isinstance(v, bool) else (1, 0.0, cell_text(v))
                for v in values
            ]

        return sorted(rows, key=key)


def _columns(names: str, kind: Kind, role: Role, unit: str = "", since: int = 1) -> Iterator[Column]:
    return (Column(name, kind, role, unit, since) for name in names.split())


ACCURACY = Table(
    "accuracy.csv",
    (
        *_columns("run_id cell_id", "text", "origin"),
        *_columns("model dtype method mode", "text", "setting"),
        Column("sparsity_target", "number", "setting", "share"),
        Column("sparsity_realized", "number", "measured", "share"),
        *_columns("estimator predictor", "text", "setting"),
        Column("rank", "whole", "setting"),
        *_columns("predictor_input exact_projection", "text", "setting", since=3),
        Column("exact_chosen", "text", "fact", since=3),
        Column("calibration", "text", "setting"),
        Column("fit_id", "text", "origin"),
        Column("scope", "text", "setting"),
        Column("sparse_share", "number", "measured", "share"),
        Column("bytes_share", "number", "derived", "share"),
        Column("task", "text", "task"),
        *_columns("task_version data_fingerprint", "text", "fact"),
        Column("num_fewshot", "whole", "task"),
        Column("fewshot_split", "text", "fact", since=2),
        Column("chat", "text", "task", since=2),
        *_columns("filter metric", "text", "task"),
        Column("higher_is_better", "flag", "fact"),
        Column("aggregation", "text", "fact", since=2),
        *_columns("value stderr", "number", "measured"),
        Column("chance", "number", "fact"),
        *_columns("delta_dense delta_ci_low delta_ci_high", "number", "derived"),
        Column("n_samples", "count", "measured", "documents"),
        Column("limit", "whole", "task", "documents"),
        Column("batch_size", "whole", "fact"),
        Column("seed", "whole", "setting"),
        *_columns("status reason", "text", "status"),
        Column("elapsed_s", "number", "measured", "s"),
    ),
    first=tuple(
        "model dtype task batch_size scope method mode sparsity_target estimator calibration seed filter metric".split()
    ),
)
GROUPS = Table(
    "groups.csv",
    (
        Column("run_id", "text", "origin", since=3),
        Column("group", "text", "task", since=3),
        Column("group_version", "text", "fact", since=3),
        *_columns("model dtype method mode", "text", "setting", since=3),
        Column("sparsity_target", "number", "setting", "share", since=3),
        *_columns("estimator predictor", "text", "setting", since=3),
        Column("rank", "whole", "setting", since=3),
        *_columns("predictor_input exact_projection", "text", "setting", since=3),
        *_columns("calibration scope chat", "text", "setting", since=3),
        *_columns("filter metric", "text", "task", since=3),
        *_columns("higher_is_better weight_by_size", "flag", "fact", since=3),
        *_columns("value stderr chance delta_dense delta_ci_low delta_ci_high", "number", "derived", since=3),
        Column("n_tasks", "count", "fact", since=3),
        Column("n_samples", "count", "measured", "documents", since=3),
        Column("limit", "whole", "setting", "documents", since=3),
        Column("batch_size", "whole", "fact", since=3),
        Column("seed", "whole", "setting", since=3),
        *_columns("status reason", "text", "status", since=3),
        Column("cell_ids", "text", "origin", since=3),
    ),
    first=tuple(
        "model dtype group batch_size scope method mode sparsity_target estimator calibration seed filter metric".split()
    ),
)
SAMPLES = Table(
    "samples.csv.gz",
    (
        Column("cell_id", "text", "setting"),
        Column("task", "text", "fact"),
        *_columns("doc_id metric", "text", "setting"),
        Column("value", "exact", "measured"),
        Column("item", "text", "measured", since=2),
        *_columns("n_choices n_gold", "count", "fact", since=2),
    ),
)
SPEED = Table(
    "speed.csv",
    (
        *_columns("run_id cell_id", "text", "origin"),
        Column("level", "text", "setting"),
        Column("model", "text", "fact"),
        Column("model_shape", "text", "setting"),
        *_columns("d_model d_ff n_layers", "count", "fact"),
        Column("activation", "text", "fact"),
        *_columns("dtype method mode", "text", "setting"),
        Column("sparsity_target", "number", "setting", "share"),
        Column("sparsity_realized", "number", "measured", "share"),
        Column("predictor", "text", "setting"),
        Column("rank", "whole", "setting"),
        *_columns("predictor_input exact_projection", "text", "setting", since=3),
        Column("exact_chosen", "text", "fact", since=3),
        *_columns("backend variant", "text", "setting"),
        Column("threads", "whole", "setting"),
        *_columns("batch_size context_tokens", "whole", "setting", "tokens"),
        *_columns("clock cache", "text", "setting"),
        Column("rounds", "count", "measured"),
        *_columns("latency_us_median latency_us_q25 latency_us_q75 latency_us_min", "number", "measured", "us"),
        *_columns("jit_s capture_s", "number", "measured", "s"),
        Column("launch_us", "number", "measured", "us"),
        Column("tokens_per_s", "number", "derived", "1/s"),
        Column("mlp_share", "number", "measured", "share"),
        Column("bytes_read_mib", "number", "derived", "MiB"),
        Column("read_bandwidth_gb_s", "number", "measured", "GB/s"),
        Column("efficiency", "number", "derived", "share"),
        *_columns("peak_memory_mib extra_memory_mib", "number", "measured", "MiB"),
        Column("max_rel_error", "number", "measured"),
        Column("check", "text", "status"),
        *_columns("device_name driver_version", "text", "origin"),
        *_columns("status reason", "text", "status"),
    ),
    first=tuple(
        "model dtype level model_shape batch_size threads method mode sparsity_target backend variant clock "
        "context_tokens".split()
    ),
)
TIMINGS = Table(
    "timings.csv.gz",
    (
        Column("cell_id", "text", "setting", since=3),
        Column("round", "whole", "setting", since=3),
        Column("latency_us", "number", "measured", "us", since=3),
    ),
)
PHASES = Table(
    "phases.csv",
    (
        Column("cell_id", "text", "setting"),
        Column("phase", "listed", "setting"),
        *_columns("us_median us_q05 us_q95", "number", "measured", "us"),
    ),
)
DECODE_CHECK = Table(
    "decode_check.csv",
    (
        Column("cell_id", "text", "setting"),
        Column("n_steps", "count", "fact"),
        *_columns("max_error bound", "number", "measured"),
        *_columns("kl_median kl_q95 kl_max", "number", "measured", "nats"),
        Column("top1_agreement", "number", "measured", "share"),
    ),
)
SPARSITY = Table(
    "sparsity.csv",
    (
        Column("cell_id", "text", "setting"),
        Column("layer", "whole", "setting"),
        Column("site", "text", "setting", since=3, before="mlp.neurons"),
        Column("threshold", "number", "fact"),
        Column("sparsity_target", "number", "fact", "share"),
        Column("sparsity_realized", "number", "measured", "share"),
        Column("n_tokens", "count", "measured", "tokens"),
    ),
)
PREDICTOR = Table(
    "predictor.csv",
    (
        Column("fit_id", "text", "setting"),
        *_columns("model method predictor", "text", "fact"),
        Column("rank", "whole", "fact"),
        Column("predictor_input", "text", "fact", since=3),
        Column("sparsity_target", "number", "fact", "share"),
        Column("layer", "whole", "setting"),
        *_columns(
            "recall precision overlap_at_k mass_kept mass_kept_ideal sparsity_realized", "number", "measured", "share"
        ),
        Column("train_tokens", "count", "fact", "tokens"),
        Column("loss", "number", "measured"),
        Column("fit_s", "number", "measured", "s"),
        Column("peak_memory_mib", "number", "measured", "MiB"),
    ),
)
CLAIMS = Table(
    "claims.csv",
    (
        *_columns("claim model method against mode scope", "text", "setting"),
        Column("sparsity_target", "number", "setting", "share"),
        Column("sparsity_realized", "number", "measured", "share"),
        Column("quantity", "text", "setting"),
        *_columns("value ci_low ci_high", "number", "derived"),
        Column("abstract_says", "text", "fact"),
        *_columns("verdict reason", "text", "status"),
    ),
)
EQUAL_BYTES = Table(
    "equal_bytes.csv",
    (
        *_columns("model dtype scope method label", "text", "setting", since=3),
        Column("bytes_share", "number", "setting", "share", since=3),
        *_columns("task metric", "listed", "setting", since=3),
        *_columns("sparsity_less sparsity_more part_more", "number", "derived", "share", since=3),
        *_columns("value delta_dense delta_ci_low delta_ci_high", "number", "derived", since=3),
        Column("reason", "text", "status", since=3),
    ),
)
ACTIVATIONS = Table(
    "activations.csv",
    (
        *_columns("model dtype", "text", "setting"),
        Column("layer", "whole", "setting"),
        Column("quantity", "listed", "setting"),
        *_columns("mean q05 q25 q50 q75 q95 q99", "number", "measured"),
        *_columns("mass_kept_at_50 mass_kept_at_70 mass_kept_at_80 mass_kept_at_90", "number", "measured", "share"),
        Column("n_tokens", "count", "measured", "tokens"),
    ),
)
CIF_CAF = Table(
    "cif_caf.csv",
    (
        *_columns("model row_method", "text", "setting"),
        Column("sparsity", "number", "setting", "share"),
        *_columns("cif_alive cif_dead caf_alive caf_dead", "number", "measured", "share"),
        Column("n_tokens", "count", "measured", "tokens"),
    ),
)
TABLES = (
    *(
        ACCURACY,
        GROUPS,
        SAMPLES,
        SPEED,
        TIMINGS,
        PHASES,
        DECODE_CHECK,
        SPARSITY,
        PREDICTOR,
        CLAIMS,
        EQUAL_BYTES,
        ACTIVATIONS,
        CIF_CAF,
    ),
)
