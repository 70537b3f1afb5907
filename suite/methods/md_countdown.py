"""MD-COUNTDOWN: neurons ranked by one projection, exact, times what a low rank tells of the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from suite.errors import InputError
from suite.methods.base import THIS_SUITE, Activations, Calibrated, Factor, Method, PredictorInput, Projection

if TYPE_CHECKING:
    from torch import Tensor

Exact = Literal["up", "gate", "auto"]


@dataclass(frozen=True, kw_only=True)
class MdCountdown(Method):
    """Score ``abs(u) sqrt(act(g^)^2 + c)``, the root of the expected ``v^2`` where u is exact and g^ of a low rank.

    ``c = E (a - act(g^))^2``; with the gate exact ``abs(a) sqrt(u^^2 + e)``, ``e = E (u - u^)^2``. ``exact="auto"`` lets the
    fit choose on its calibration text; ``predictor_input`` is what the low rank reads. Defaults: NOTES.md of suite/fitting.
    """

    rank: int = 64
    exact: Exact = "up"
    predictor_input: PredictorInput = "mlp"
    fit_rounds: int = 1

    name: ClassVar[str] = "md-countdown"
    source: ClassVar[str] = THIS_SUITE
    first_projection: ClassVar[Projection | None] = "up"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "fit_rounds"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise InputError(f"{name} {value!r} of method {self.name}: must be a whole number, at least 1")
        for name, known in (("exact", get_args(Exact)), ("predictor_input", get_args(PredictorInput))):
            if (value := getattr(self, name)) not in known:
                raise InputError(f"{name} {value!r} of method {self.name}: must be one of {', '.join(known)}")

    @property
    def exact_projection(self) -> str:
        """As the parameter says."""
        return self.exact

    @property
    def candidates(self) -> Mapping[str, Sequence[Any]]:
        """Both projections for ``auto``."""
        return {"exact": ("up", "gate")} if self.exact == "auto" else {}

    @property
    def factors(self) -> Mapping[Projection, int]:
        """The other projection."""
        return {"up" if self.exact == "gate" else "gate": self.rank}

    def low_rank(self, calibrated: Calibrated) -> Factor | None:
        """The factor of the projection that is not exact."""
        (other,) = self.factors
        return calibrated.factors[other]

    def score(self, activations: Activations) -> Tensor:
        """Root of the expected ``v_i^2``, fp32."""
        seen = activations.block if self.predictor_input == "block" else activations.input
        if self.exact == "gate":
            return activations.act.abs().float() * activations.factor("up").rms(seen, None)
        return activations.up.abs().float() * activations.factor("gate").rms(seen, activations.act_fn)
