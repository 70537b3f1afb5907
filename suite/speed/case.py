"""A speed case, the kernel that its method runs on, and what became of it. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum, auto
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from suite import schema
from suite.devices import DTYPE_BYTES
from suite.errors import InputError
from suite.methods.base import NEURONS, PredictorInput, Quantity
from suite.methods.cost import calibrated_bytes, gated_share, low_rank_weights, read_share
from suite.registry import METHODS, did_you_mean, get_method, method_class

if TYPE_CHECKING:
    from collections.abc import Sequence

    from suite.methods.base import Method
    from suite.modeling.modes import ThresholdState

Row = dict[str, object]
Progress = Callable[[str], None]

# What is timed beside methods: a given active set, which is what a method with a predictor runs once it is known.
GIVEN = "given"
COLUMNS = [column for column in schema.SPEED.names if column not in ("run_id", "cell_id")]
# Columns that only a timed case can have.
_TIMED = frozenset(
    "rounds latency_us_median latency_us_q25 latency_us_q75 latency_us_min capture_s launch_us tokens_per_s mlp_share "
    "bytes_read_mib read_bandwidth_gb_s efficiency phases timings".split()
)
_DIGITS = 6  # of a latency: clocks tell a millionth of a time apart at best
# Quartiles of undisturbed rounds lie within 1.3x of each other (GPU: 1.01); another process on the same cores moves them apart.
_MAX_SPREAD = 1.5
DISTURBED = f"disturbed: quartiles of the rounds lie more than {_MAX_SPREAD:g}x apart; time it again on a quiet machine"


class Kernel(Enum):
    """What computes a layer, by the contract of its method."""

    DENSE = auto()  # torch's own products: a method without a ranking
    THRESHOLD = auto()  # the first projection densely, then the neurons whose magnitude reaches a threshold
    PREDICTOR = auto()  # a predictor, then the neurons that it names
    GIVEN = auto()  # the neurons of a given set alone
    GATHERED = auto()  # torch's own products over weights of a set that is known before, gathered once

    @property
    def is_torch(self) -> bool:
        """Whether torch computes it, on any device."""
        return self in (Kernel.DENSE, Kernel.GATHERED)

    @property
    def mode(self) -> str:
        """Mode of its rows."""
        return {Kernel.DENSE: "none", Kernel.GIVEN: "ideal"}.get(self, "practical")


@cache
def kernel_of(method: str) -> Kernel:
    """Kernel of a method by registry name or ``module:Class``, or of `GIVEN`.

    Raises
    ------
    InputError
        Unknown method, or one whose practical mode no kernel could run.
    """
    if method == GIVEN:
        return Kernel.GIVEN
    if ":" not in method and method not in METHODS:
        raise InputError(f"unknown speed method {method!r}{did_you_mean(method, [*METHODS, GIVEN])}")
    cls = method_class(method)
    if cls.sites != (NEURONS,):
        raise InputError(f"method {method!r} masks {' and '.join(cls.sites)}: the kernels skip neurons alone")
    if "practical" in cls.modes:
        if cls.fixed_set:
            return Kernel.GATHERED
        if cls.needs_predictor:
            return Kernel.PREDICTOR
        if cls.first_projection in ("gate", "up"):
            return Kernel.THRESHOLD
        if cls.first_projection:
            raise InputError(f"method {method!r}: no kernel computes its score; leave it out of the speed cases")
        raise InputError(f"method {method!r} has neither one first projection nor a predictor: no kernel runs it")
    if "none" in cls.modes:
        return Kernel.DENSE
    raise InputError(f"method {method!r} has no practical mode: leave it out of the speed cases")


@dataclass(frozen=True, kw_only=True)
class SpeedCase:
    """One timed case: a method at one sparsity on one layer shape and backend.

    Parameters
    ----------
    level : "op" (the down projection alone), "layer" (one gated MLP) or "decode" (a token of a whole model)
    model_shape : name of the shape; d_model, d_ff and activation are its values
    method : registry name or ``module:Class``, or `GIVEN`
    params : parameters of the method besides its sparsity
    mode : "none" for dense, "practical" for thresholds, predictors and fixed sets, "ideal" for a given set (exactly k kept)
    backend : "torch" (dense, and dense layers of a fixed set), "numba-cpu" or "numba-cuda"
    device : "cpu" or "cuda"
    threads : CPU threads; 0 on a GPU
    variant : "eager"; of dense on a GPU "compile"; of a CUDA kernel "no-overlap" (without programmatic dependent launch),
        of a method that selects by a dense projection "deterministic" (sums in one order), or "trace" (with the clock
        written at every phase)
    clock : "wall" on a CPU, "graph" or "event" on a GPU
    rank : of a low-rank predictor, of each projection of a gated one, or of the factors that the method's score asks for
    predictor : "gated" of a predictor of that kind; else None
    predictor_input : "mlp" or "block" where a gated predictor or a factor reads one of them
    exact_projection : of a method with factors; "auto" where a fit chooses it
    context_tokens : tokens in the cache, of level "decode" only
    """

    level: str = "layer"
    model_shape: str
    d_model: int
    d_ff: int
    activation: str = "silu"
    dtype: str = "float32"
    method: str
    params: Mapping[str, Any] = field(default_factory=dict, hash=False)
    mode: str
    sparsity: float = 0.0
    backend: str
    device: str = "cpu"
    variant: str = "eager"
    batch_size: int = 1
    threads: int = 1
    clock: str = "wall"
    cache: str = "cold"
    rank: int | None = None
    predictor: Literal["gated"] | None = None
    predictor_input: PredictorInput | None = None
    exact_projection: str | None = None
    context_tokens: int | None = None

    def key_fields(self) -> dict[str, Any]:
        """Everything about the case that decides its number, as plain values."""
        return asdict(self)

    @property
    def kernel(self) -> Kernel:
        """Kernel of its method."""
        return kernel_of(self.method)

    @property
    def made(self) -> Method:
        """Its method, but for a given set."""
        return get_method(self.method, sparsity=self.sparsity, **self.params)

    @property
    def first_projection(self) -> str:
        """Projection that is computed densely, and whose magnitude the threshold is set on; "" without a threshold."""
        return self.made.exact_projection if self.kernel is Kernel.THRESHOLD else ""

    @property
    def predicted(self) -> tuple[Quantity, ...]:
        """What its gated predictor approximates; nothing if it has none."""
        return self.made.predicted if self.predictor == "gated" else ()

    @property
    def group(self) -> str:
        """Cases of one group are timed interleaved in one go and always run again together."""
        shape = f"{self.model_shape}-{self.d_model}x{self.d_ff}-{self.activation}"
        shape = f"decode-{shape}" if self.level == "decode" else shape
        return f"{self.device}-{shape}-{self.dtype}-b{self.batch_size}-t{self.threads}"

    @property
    def label(self) -> str:
        """Short name for progress and logs."""
        named = "".join(f" {name}={value}" for name, value in self.params.items())
        named += f" {self.predictor} {self.predictor_input}" if self.predictor else ""
        sparsity = "" if self.kernel is Kernel.DENSE else f" s={self.sparsity:g}"
        return f"{self.model_shape} {self.level} {self.method}{named}{sparsity} {self.backend}"


States = Mapping[SpeedCase, "ThresholdState"]


def needed_bytes(case: SpeedCase, realised: float) -> float:
    """Bytes of weights a case has to read for one token at a realised sparsity (activations are left out).

    Of a layer those of `suite.methods.cost`; of the down projection alone its kept columns.
    """
    weights = case.d_model * case.d_ff
    if case.level == "op":
        return weights * (1.0 - realised) * DTYPE_BYTES[case.dtype]
    elements = 3 * weights * read_share(None if case.method == GIVEN else method_class(case.method), realised)
    if case.kernel is Kernel.PREDICTOR and case.rank and not case.predictor:
        elements += low_rank_weights(case.rank, case.d_model, case.d_ff)
    needed = elements * DTYPE_BYTES[case.dtype]
    if case.predictor and case.rank:
        share = gated_share(case.rank, len(case.predicted), case.d_model, case.d_ff, case.dtype)
        needed += share * 3 * weights * DTYPE_BYTES[case.dtype]
    if case.kernel is Kernel.THRESHOLD:
        needed += calibrated_bytes(case.made, case.d_model, case.d_ff, case.dtype)
    return needed


def microseconds(seconds: Sequence[float]) -> list[float]:
    """Times in microseconds to 6 digits, as they are stored, so that quartiles follow from what is stored."""
    return [float(f"{1e6 * one:.{_DIGITS}g}") for one in seconds]


def time_columns(latencies_us: Sequence[float]) -> Row:
    """Columns of a time, on any device and level: its quartiles, and in ``reason`` that it was disturbed.

    Parameters
    ----------
    latencies_us : microseconds of each round
    """
    q25, median, q75 = (float(q) for q in np.percentile(latencies_us, [25, 50, 75]))
    return {
        "rounds": len(latencies_us),
        "latency_us_median": median,
        "latency_us_q25": q25,
        "latency_us_q75": q75,
        "latency_us_min": min(latencies_us),
        "status": "ok",
        "reason": DISTURBED if q75 > _MAX_SPREAD * q25 else "",
    }


def phase_row(name: str, latencies_us: Sequence[float]) -> Row:
    """Row of schema.PHASES (without cell_id): quantiles of the times of a part."""
    low, median, high = (float(q) for q in np.percentile(latencies_us, [5, 50, 95]))
    return {"phase": name, "us_median": median, "us_q05": low, "us_q95": high}


@dataclass(frozen=True)
class Check:
    """Outcome of a check.

    Parameters
    ----------
    error : relative to the largest output; None if there is nothing to compare with
    reason : what is wrong; "" if nothing
    facts : columns that are known by now
    """

    error: float | None
    reason: str = ""
    facts: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What became of a case. It has a time exactly if its check passed: anything else cannot be built.

    Parameters
    ----------
    check : "passed", "failed" (timed wrong numbers would mean nothing) or "skipped" (cannot run here)
    reason : why it did not pass
    facts : other columns of schema.SPEED, and what belongs to the row: ``phases``, ``decode_check``
    latencies_us : of a layer or a token, one a round, as `microseconds` makes them

    Raises
    ------
    ValueError
        A time, or a column that follows from one, without a passed check; a passed check without a time; neither a time
        nor a reason.
    """

    case: SpeedCase
    check: Literal["passed", "failed", "skipped"]
    reason: str = ""
    facts: Row = field(default_factory=dict)
    latencies_us: Sequence[float] = ()

    def __post_init__(self) -> None:
        timed = sorted(name for name in self.facts.keys() & _TIMED if self.facts[name] is not None)
        if self.check != "passed" and (len(self.latencies_us) or timed):
            what = ", ".join(timed) or "a time"
            raise ValueError(f"{self.case.label}: {what} although its check was {self.check}; time only what passed")
        if self.check == "passed" and not len(self.latencies_us):
            raise ValueError(f"{self.case.label}: its check passed, but it has no time")
        if self.check != "passed" and not self.reason:
            raise ValueError(f"{self.case.label}: {self.check} without a reason")

    def row(self) -> Row:
        """Row of schema.SPEED without run_id and cell_id, with ``timings`` if it was timed; None is an empty cell."""
        found: Row = dict.fromkeys(COLUMNS)
        found.update({name: value for name, value in self.case.key_fields().items() if name in found})
        found |= {"sparsity_target": self.case.sparsity, "check": self.check}
        if self.case.device != "cpu":
            found["threads"] = None
        if self.check != "passed":
            return found | self.facts | {"status": self.check, "reason": self.reason}
        found["exact_chosen"] = self.case.exact_projection  # what a fit chose is among the facts
        return found | self.facts | time_columns(self.latencies_us) | {"timings": list(self.latencies_us)}
