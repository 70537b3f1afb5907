"""How a predictor is trained; loads no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from suite.errors import InputError
from suite.methods.base import PredictorInput
from suite.methods.cost import gated_rank
from suite.registry import did_you_mean

Predictor = Literal["low-rank", "ternary", "gated"]
Loss = Literal["bce", "bce-abs", "bce-square", "bce-margin", "mass"]
Start = Literal["random", "regression"]
Schedule = Literal["inverse-sqrt", "linear"]
PredictorEstimator = Literal["calibrated", "zero"]
PREDICTOR_INPUTS: tuple[PredictorInput, ...] = get_args(PredictorInput)
PREDICTORS: tuple[Predictor, ...] = get_args(Predictor)
LOSSES: tuple[Loss, ...] = get_args(Loss)
STARTS: tuple[Start, ...] = get_args(Start)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
PREDICTOR_ESTIMATORS: tuple[PredictorEstimator, ...] = get_args(PredictorEstimator)

_MOST_RANK = 512  # the paper's, for d_model 3584 to 5120


@dataclass(frozen=True)
class PredictorOptions:
    """Training of a predictor; why the defaults are what they are stands in NOTES.md beside this file.

    Parameters
    ----------
    predictor : {"low-rank", "ternary", "gated"}
        ``(x V) U^T``; a full matrix in {-1, 0, 1} times one scale a layer; or the projections that the score is made of,
        each of a low rank, with what they miss: in closed form, so that of what follows only rank, rounds and
        predictor_input count.
    rank : int, optional
        Of the low-rank one; default min(512, d_model // 2). Of each projection of the gated one; default half of that less 2,
        so that with its residuals it has no more bytes.
    epochs : int
        Passes over the training tokens; 0 leaves the regression as it is.
    loss : {"bce", "bce-abs", "bce-square", "bce-margin", "mass"}
        Binary cross-entropy with logits, label 1 for what the method's ideal rule keeps; its terms weighted by 1, by
        abs(s), by s^2 or by abs(s - t), where s is the method's score and t the token's kth score. mass: for every neuron
        the term of label 1, weighted by q = min((s/t)^2, 9), and that of label 0, weighted by 1, so that the logit tends
        to log E[q | x]: ranking by what is expected to be kept, not by the chance to be kept.
    pos_weight : float
        Weight of the terms with label 1.
    start : {"random", "regression"}
        First matrices: drawn, or (low-rank only) the reduced-rank least-squares regression of the labels, or of q, on x.
    schedule : {"inverse-sqrt", "linear"}
        Learning rate after a warm-up over a tenth of the steps.
    learning_rate : float
    batch_tokens : int
        Tokens of one step.
    rounds : int
        Trainings: the first on activations of the dense model, later ones on those made with the predictors of the round
        before in all layers, which is where they will work. They start from the round before, or from a regression anew.
    predictor_input : {"mlp", "block"}
        What it reads: the input of its MLP, or (only a gated one) that of its whole block behind the block's first norm,
        which is known before attention is computed.

    Raises
    ------
    InputError
        A value out of its range.
    """

    predictor: Predictor = "low-rank"
    rank: int | None = None
    epochs: int = 5
    loss: Loss = "mass"
    pos_weight: float = 1.0
    start: Start = "regression"
    schedule: Schedule = "linear"
    learning_rate: float = 1e-3
    batch_tokens: int = 2048
    rounds: int = 2
    predictor_input: PredictorInput = "mlp"

    def __post_init__(self) -> None:
        for name, known in (
            ("predictor", PREDICTORS),
            ("loss", LOSSES),
            ("start", STARTS),
            ("schedule", SCHEDULES),
            ("predictor_input", PREDICTOR_INPUTS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"unknown {name} {value!r} of a predictor{did_you_mean(str(value), known)}")
        for name, least in (("epochs", 0), ("batch_tokens", 1), ("rounds", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} {value!r} of a predictor: must be a whole number, at least {least}")
        for name in ("pos_weight", "learning_rate"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise InputError(f"{name} {value!r} of a predictor: must be a positive number")
        if self.epochs == 0 and (self.start == "random" or self.predictor == "ternary"):
            raise InputError("epochs 0 of a predictor: only the regression of a low-rank one is of use untrained")
        if self.predictor_input == "block" and self.predictor != "gated":
            raise InputError(f"predictor_input block of a {self.predictor} predictor: only a gated one reads it")
        if self.rank is not None and self.predictor == "ternary":
            raise InputError(f"rank {self.rank} of a ternary predictor: it has none; leave it out")
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise InputError(f"rank {self.rank!r} of a predictor: must be a whole number from 1 to d_model")

    @property
    def is_closed_form(self) -> bool:
        """Whether it stands in for projections that a method names in `predicted`; nothing of it is trained."""
        return self.predictor == "gated"

    def rank_for(self, d_model: int, n_projections: int = 1) -> int | None:
        """Rank on a model, of a gated predictor that of each of its projections; None for ternary.

        Raises
        ------
        InputError
            A rank above d_model.
        """
        if self.predictor == "ternary":
            return None
        if self.rank is None:
            most = min(_MOST_RANK, d_model // 2)
            return gated_rank(most, n_projections) if self.predictor == "gated" else most
        if self.rank > d_model:
            raise InputError(
                f"rank {self.rank} of a predictor is above the model's d_model {d_model}: give at most that"
            )
        return self.rank

    def fields(self) -> dict[str, Any]:
        """The values that count, by name; of the input only one that is not the MLP's own: part of the key of a fit."""
        found = asdict(self)
        if self.predictor == "gated":
            found = {name: found[name] for name in ("predictor", "rank", "rounds", "predictor_input")}
            found["version"] = 3  # of the default rank: 1 counted no residuals, 2 always two projections
        if self.predictor_input == "mlp":
            del found["predictor_input"]
        return found
