"""Practical methods at equal bytes: each between the two of its measured settings that read a little less and a little more.

Perplexities are interpolated log-linearly (their logarithm is linear in the bytes), accuracies linearly. Both are means
over documents, and so is a mean of two settings on the same documents: its interval is as exact as theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from suite import schema
from suite.evaluation.tasks import DECODE_PERPLEXITY
from suite.report.quality import Average, Interval, Quality, cell_value
from suite.report.results import CHOICE, VARIANT, number
from suite.report.speed import PROBES
from suite.report.task_names import text_order

LEVELS = (0.35, 0.45, 0.55)  # of the dense MLP's bytes
AVERAGE, SPEED_UP = "average", "decode speed-up"  # of column `task`, where no task is meant
_ROUNDING = 1e-9  # of bytes: 1 - .55 is not .45
_PLACE = ("model", "dtype", "scope")
Row = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A method with one fit: its practical settings, of falling sparsity."""

    place: dict[str, str]
    settings: Sequence[Average]

    @property
    def label(self) -> str:
        """Method, and what tells its fits apart."""
        return self.settings[0].label


@dataclass(frozen=True)
class Between:
    """Two settings of a line and the bytes between them; ``part`` is what the one that reads more has in their mean."""

    less: Average
    more: Average
    part: float

    @property
    def ends(self) -> tuple[Average, Average]:
        """Both settings."""
        return self.less, self.more

    def mean(self, less: Any, more: Any) -> Any:
        """Mean of something of both, linear in the bytes."""
        return (1 - self.part) * less + self.part * more


def lines(quality: Quality) -> list[Line]:
    """Practical lines of every model and scope that has an average, in the order of tables."""
    rows = pd.concat([quality.summary, quality.text], ignore_index=True)
    found: dict[tuple[Any, ...], list[Average]] = {}
    for one in quality.settings(rows[rows["mode"] == "practical"]):
        if quality.tasks_of(one.setting):
            key = tuple(one.setting[name] for name in (*_PLACE, "method", *VARIANT))
            found.setdefault(key, []).append(one)
    places = dict.fromkeys(key[: len(_PLACE)] for key in sorted(found, key=lambda key: key[: len(_PLACE)]))
    return [
        Line(dict(zip(_PLACE, place, strict=True)), sorted(own, key=lambda s: -float(s.setting["sparsity_target"])))
        for place in places
        for key, own in found.items()
        if key[: len(_PLACE)] == place
    ]


def between(line: Line, columns: Sequence[str], level: float) -> Between | str:
    """The neighbouring settings at so many bytes, or why there are none.

    Parameters
    ----------
    columns : tasks of the average, or a ``task metric``: a setting's bytes are the mean of theirs
    level : share of the dense MLP's bytes
    """
    known = sorted(
        ((share, one) for one in line.settings if (share := _bytes(one, columns)) is not None), key=lambda pair: pair[0]
    )
    if not known:
        return "no finished setting"
    for (low, less), (high, more) in zip(known, known[1:] or known, strict=False):
        if low - _ROUNDING <= level <= high + _ROUNDING:
            return Between(less, more, 0.0 if high == low else min(1.0, max(0.0, (level - low) / (high - low))))
    low, high = known[0][0], known[-1][0]
    return (
        f"measured from {100 * low:.1f} to {100 * high:.1f} %" if low < high else f"measured at {100 * low:.1f} % alone"
    )


def _bytes(one: Average, columns: Sequence[str]) -> float | None:
    """Mean bytes of a setting over some columns; None where one of them has no value."""
    cells = [one.cells.get(column) for column in columns]
    shares = [number(cell["bytes_share"]) for cell in cells if cell is not None and cell_value(cell) is not None]
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known and len(known) == len(columns) else None


def texts_of(own: Sequence[Line]) -> list[str]:
    """Columns of the perplexities of generation, the headline first."""
    found = {column for line in own for one in line.settings for column in one.cells}
    return sorted((c for c in found if c.startswith(DECODE_PERPLEXITY) and c.endswith(" perplexity")), key=text_order)


def equal_bytes(quality: Quality, speed: pd.DataFrame) -> pd.DataFrame:
    """Rows of equal_bytes.csv, those of a model and scope together, methods in the order of tables.

    Parameters
    ----------
    quality : Quality
    speed : DataFrame
        From :func:`suite.report.speed.with_speed_up`.
    """
    every = lines(quality)
    rows: list[Row] = []
    for place in dict.fromkeys(tuple(line.place.values()) for line in every):
        own = [line for line in every if tuple(line.place.values()) == place]
        made = _Maker(quality, speed, own[0].place, texts_of(own))
        for level, line in product(LEVELS, own):
            common = line.place | {"method": line.settings[0].method, "label": line.label, "bytes_share": level}
            rows += [common | row for row in made.rows(line, level)]
    kinds = {column.name: "float64" if column.is_number else "object" for column in schema.EQUAL_BYTES.columns}
    return pd.DataFrame(rows, columns=schema.EQUAL_BYTES.names).astype(kinds)


class _Maker:
    """Makes the rows of one model and scope."""

    def __init__(self, quality: Quality, speed: pd.DataFrame, place: dict[str, str], texts: Sequence[str]) -> None:
        self._quality, self._speed, self._texts = quality, speed, texts
        self._tasks = quality.tasks_of(place)
        self._dense = quality.dense_of(place, quality.settings(pd.concat([quality.summary, quality.text])))

    def rows(self, line: Line, level: float) -> Iterator[Row]:
        """A line at one level: every task, the average, perplexities, speed-up."""
        found = between(line, self._tasks, level)
        for task in self._tasks:
            metric, _ = self._quality.metric_of(task) or ("", "")
            yield {"task": task, "metric": metric} | _valued(found, partial(_accuracy, [task]))
        average = {"task": AVERAGE, "metric": ""} | _valued(found, partial(_accuracy, self._tasks))
        yield average | _delta(found, self._difference)
        for column in self._texts:
            task, _, metric = column.partition(" ")
            pair = between(line, [column], level)
            row = {"task": task, "metric": metric} | _valued(pair, partial(_perplexity, column))
            yield row | _delta(pair, partial(self._ratio, column))
        yield {"task": SPEED_UP, "metric": ""} | _valued(found, self._speed_up)

    def _difference(self, pair: Between) -> Interval | None:
        """Average minus dense's, documents resampled within each task."""
        if self._dense is None:
            return None
        return self._quality.quantity(
            [pair.less, pair.more, self._dense],
            self._tasks,
            lambda means: sum(pair.mean(m[0], m[1]) - m[2] for m in means) / len(means),
        )

    def _ratio(self, column: str, pair: Between) -> Interval | None:
        """Perplexity minus dense's, resampled as a log-ratio."""
        top = None if self._dense is None else cell_value(self._dense.cells.get(column))
        if self._dense is None or top is None:
            return None
        found = self._quality.quantity(
            [pair.less, pair.more, self._dense], [column], lambda means: pair.mean(*means[0][:2]) - means[0][2]
        )
        if found is None:
            return None
        low, high = (None if end is None else top * math.expm1(end) for end in found[1:])
        return top * math.expm1(found[0]), low, high

    def _speed_up(self, pair: Between) -> float | None:
        """Of decoding at batch 1 with the shortest context and the most threads: of the time, which is linear in the bytes."""
        setting, speed = pair.less.setting, self._speed
        rows = speed[(speed["level"] == "decode") & (speed["batch_size"] == "1") & speed["speed_up"].notna()]
        rows = rows[~rows["variant"].isin(PROBES)]
        for name in ("model", "dtype", "method", *CHOICE):
            rows = rows[rows[name] == setting[name]]
        # a GPU has 0 threads, or an empty cell
        rows = rows.assign(tokens=pd.to_numeric(rows["context_tokens"]), idle=-pd.to_numeric(rows["threads"]).fillna(0))
        for _, same in rows.groupby(["tokens", "idle", "device_name", "variant"]):
            times = [
                1 / same.loc[same["sparsity_target"] == one.setting["sparsity_target"], "speed_up"] for one in pair.ends
            ]
            if all(len(time) == 1 for time in times):
                return 1 / float(pair.mean(*(time.iloc[0] for time in times)))
        return None


def _valued(found: Between | str, value: Callable[[Between], float | None]) -> Row:
    if isinstance(found, str):
        return {"reason": found}
    made = value(found)
    less, more = (one.setting["sparsity_target"] for one in found.ends)
    ends = {"sparsity_less": less, "sparsity_more": more, "part_more": found.part}
    return ends | {"value": made, "reason": "" if made is not None else "not measured"}


def _delta(found: Between | str, delta: Callable[[Between], Interval | None]) -> Row:
    if isinstance(found, str) or (ends := delta(found)) is None:
        return {}
    return dict(zip(("delta_dense", "delta_ci_low", "delta_ci_high"), ends, strict=True))


def _accuracy(tasks: Sequence[str], pair: Between) -> float | None:
    """Mean over tasks, each of which both settings have: otherwise they have no bytes."""
    values = [[cell_value(one.cells.get(task)) for task in tasks] for one in pair.ends]
    return float(pair.mean(*(np.mean(np.array(own, dtype=float)) for own in values)))


def _perplexity(column: str, pair: Between) -> float | None:
    less, more = (cell_value(one.cells.get(column)) for one in pair.ends)
    return math.exp(pair.mean(math.log(less), math.log(more))) if less and more else None
