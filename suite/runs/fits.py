"""Fits: what cells need, which of them are there, and that cells of one fit saw one output of it. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.config import AccuracyBlock, MatrixConfig, MethodConfig, ModelConfig, PredictorConfig
from suite.errors import InputError
from suite.fitting.options import PredictorOptions
from suite.registry import method_class

if TYPE_CHECKING:
    from suite.runs.cells.base import Cell
    from suite.runs.store import Record
    from suite.speed.case import SpeedCase


@dataclass(frozen=True)
class FitRequest:
    """A fit that a practical cell needs: thresholds, or with ``options`` a predictor, of one method at one sparsity."""

    model: str
    dtype: str
    method: str
    params: Mapping[str, Any] = field(hash=False)
    sparsity: float
    estimator: str
    calibration: str
    max_tokens: int
    seed: int
    options: PredictorOptions | None = None

    @property
    def shared(self) -> tuple[object, ...]:
        """What fits that are made in one go have in common."""
        return (self.model, self.dtype, self.calibration, self.max_tokens, self.seed, self.options)


def requests_of(
    config: MatrixConfig, block: AccuracyBlock, model: ModelConfig, method: MethodConfig, sparsity: float, seed: int
) -> Iterator[FitRequest]:
    """The fits of one practical setting: thresholds by every estimator, or every predictor."""
    text, predictor = config.calibration, config.predictor
    if block.predictors:
        predictor = predictor.model_copy(update={"predictors": block.predictors})
    common = (model.id, model.dtype, method.name, method.params, sparsity)
    if not method_class(method.name).needs_predictor:
        for estimator, source in product(text.estimators, block.fit_sources or [text.source]):
            yield FitRequest(*common, estimator, source, text.max_tokens, seed)
        return
    sources = block.fit_sources or predictor.sources or [text.source]
    for (options, kind), source in product(_predictors(predictor, method.name), sources):
        yield FitRequest(*common, kind, source, predictor.max_tokens, seed, options)


def _predictors(predictor: PredictorConfig, method: str) -> list[tuple[PredictorOptions, str]]:
    """Predictors that a matrix names and a method can have, each with an estimator of its threshold."""
    suited: list[tuple[PredictorOptions, str]] = [
        (options, kind)
        for options, kind in product(predictor.options(), predictor.estimators)
        # one in closed form needs to know what it stands in for, and has no logits whose threshold is 0
        if not options.is_closed_form or (method_class(method).predicted and kind != "zero")
    ]
    if not suited:
        kinds = ", ".join(dict.fromkeys(one.predictor for one in predictor.options()))
        raise InputError(
            f"method {method!r} has no practical mode with predictors {kinds} and estimators "
            f"{', '.join(predictor.estimators)}: give another of either, or leave it out"
        )
    return suited


def request_of_case(case: SpeedCase, config: MatrixConfig) -> FitRequest | None:
    """What a sparse row of a model with real weights decodes with: the first of the matrix' estimators and texts.

    A predictor is of the case's kind and reads the case's input; its rank and training are the matrix' first. None where
    nothing is fitted.
    """
    from suite.decoding.shapes import has_weights

    if case.level != "decode" or not has_weights(case.model_shape):
        return None
    if not (case.made.needs_threshold or case.made.needs_predictor):
        return None
    text, predictor = config.calibration, config.predictor
    estimator: str = text.estimators[0]
    source, max_tokens, options = text.source, text.max_tokens, None
    if method_class(case.method).needs_predictor:
        source, max_tokens = [*predictor.sources, source][0], predictor.max_tokens
        own = {"predictors": [case.predictor or "low-rank"], "predictor_inputs": [case.predictor_input or "mlp"]}
        options, estimator = _predictors(predictor.model_copy(update=own), case.method)[0]
    return FitRequest(
        model=case.model_shape,
        dtype=case.dtype,
        method=case.method,
        params=case.params,
        sparsity=case.sparsity,
        estimator=estimator,
        calibration=source,
        max_tokens=max_tokens,
        seed=config.seeds[0],
        options=options,
    )


def fits_of(cells: Iterable[Cell]) -> dict[str, FitRequest]:
    """Every fit that cells need, by its key."""
    return {cell.fit_key: cell.fit for cell in cells if cell.fit_key and cell.fit}


def has_fit(folder: Path, key: str) -> bool:
    """Whether a fit is below a folder."""
    return any(folder.glob(f"{key}*"))


def need_fits(cells: Sequence[Cell], folder: Path) -> None:
    """Refuse to go on without the fits of all cells.

    Raises
    ------
    InputError
        How many cells lack theirs.
    """
    missing = [cell for cell in cells if cell.fit_key and not has_fit(folder, cell.fit_key)]
    if missing:
        raise InputError(
            f"{len(missing)} cells need a fit that is missing, first {missing[0].label}: "
            "leave out --no-fit, or make it with `countdown-suite fit`"
        )


class Outputs:
    """SHA-256 of what each fit came out as, by its key: cells measured with two outputs of one fit are not mixed.

    Parameters
    ----------
    known : of cells that are measured already
    """

    def __init__(self, known: Mapping[str, str] | None = None) -> None:
        self.known = dict(known or {})

    def add(self, cell: Cell, sha256: str) -> None:
        """Note the output that a cell's fit has.

        Raises
        ------
        InputError
            Another one is known.
        """
        key = cell.fit_key or ""
        known = self.known.setdefault(key, sha256)
        if known != sha256:
            raise InputError(
                f"fit {key[:16]} of {cell.label} has two outputs ({known[:12]}, {sha256[:12]}): cells of "
                "both cannot be mixed; run again with --rerun all"
            )

    def add_recorded(self, cells: Iterable[Cell], records: Mapping[str, Record | None]) -> None:
        """Note those that cells were measured with."""
        for cell in cells:
            record = records[cell.key]
            if cell.fit_key and record and record.get("fit_sha256"):
                self.add(cell, record["fit_sha256"])
