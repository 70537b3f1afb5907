"""The figures' data: one frame per figure, written beside it as CSV; a figure is drawn from its frame alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from suite.report.frames import Average, Blocks, Quality, cell_value, method_order, number, task_order
from suite.report.load import Results
from suite.report.speed import SHAPE as SPEED_SHAPE
from suite.report.speed import speed_label, with_speed_up
from suite.report.tables import text_order
from suite.report.text import own_name

POINT = ["model", "dtype", "scope", "mode", "method", "label", "sparsity_target", "sparsity_realized", "bytes_share"]


@dataclass(frozen=True)
class Material:
    """A run and what is computed from it once for tables, claims and figures."""

    results: Results

    @cached_property
    def quality(self) -> Quality:
        """Accuracy in blocks."""
        return Quality(self.results)

    @cached_property
    def speed(self) -> pd.DataFrame:
        """Speed rows with speed-ups."""
        return with_speed_up(self.results.speed)


def _point(one: Average) -> dict[str, Any]:
    point = {c: one.setting[c] for c in ("model", "dtype", "scope", "mode", "method", "sparsity_target")}
    return point | {"label": one.label, "sparsity_realized": one.realized, "bytes_share": one.bytes_share}


def quality_averages(material: Material) -> pd.DataFrame:
    """Task average of every setting; its interval is that of the paired difference to dense, set upon dense's value."""
    quality, rows = material.quality, []
    for block, settings in quality.summary_blocks:
        tasks, dense = quality.tasks_of(block), quality.dense_of(block, settings)
        for one in settings:
            value = quality.average(one, tasks)
            if value is None:
                continue
            top = None if dense is None else quality.average(dense, tasks)
            found = None if dense is None or one is dense else quality.average_difference(one, dense, tasks)
            low, high = (None, None) if found is None or top is None else (_plus(top, found[1]), _plus(top, found[2]))
            chances = [number(one.cells[task]["chance"]) for task in tasks]
            known = [chance for chance in chances if chance is not None]
            chance = sum(known) / len(known) if known and len(known) == len(tasks) else None
            rows.append(
                _point(one)
                | {"scope": block["scope"], "n_tasks": len(tasks), "value": value, "ci_low": low, "ci_high": high}
                | {"chance": chance}
            )
    return _frame(rows, [*POINT, "n_tasks", "value", "ci_low", "ci_high", "chance"])


def _plus(base: float, end: float | None) -> float | None:
    return None if end is None else base + end


def _frame(rows: list[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    """Rows once each (dense and random stand in several blocks) in the order of the tables."""
    return pd.DataFrame(rows, columns=columns).drop_duplicates().reset_index(drop=True)


def _cells(material: Material, blocks: Blocks, order: Callable[[str], Any]) -> pd.DataFrame:
    """Value of every cell with the interval of its paired difference to dense set upon dense's value."""
    quality: Quality = material.quality
    found: list[dict[str, Any]] = []
    for block, settings in blocks:
        dense = quality.dense_of(block, settings)
        for one in settings:
            for task in sorted(one.cells, key=order):
                cell = one.cells[task]
                value = cell_value(cell)
                if value is None:
                    continue
                delta, low, high = (number(cell[c]) for c in ("delta_dense", "delta_ci_low", "delta_ci_high"))
                top = None if dense is None else cell_value(dense.cells.get(task))
                base = value - delta if delta is not None else top
                known = one.method != "dense" and base is not None
                found.append(
                    _point(one)
                    | {"scope": block["scope"], "task": task, "metric": cell["metric"], "value": value}
                    | {"ci_low": _plus(base, low) if known and base is not None else None}
                    | {"ci_high": _plus(base, high) if known and base is not None else None}
                    | {"chance": number(cell["chance"])}
                )
    return _frame(found, [*POINT, "task", "metric", "value", "ci_low", "ci_high", "chance"])


def quality_per_task(material: Material) -> pd.DataFrame:
    """Summary metric of every setting on every task."""
    quality = material.quality
    frame = _cells(material, quality.summary_blocks, task_order)
    tasks = {(str(b["model"]), str(b["scope"])): quality.tasks_of(b) for b, _ in quality.summary_blocks}
    keep = [
        task in tasks.get((model, scope), [])
        for model, scope, task in zip(frame["model"], frame["scope"], frame["task"], strict=True)
    ]
    return _main_scope(frame[np.array(keep, dtype=bool)])


def _main_scope(frame: pd.DataFrame) -> pd.DataFrame:
    """Without scope ``paper`` where the model has ``scored``: `quality_averages` and the tables have both."""
    main = frame.loc[frame["scope"] == "scored", "model"]
    return frame[(frame["scope"] != "paper") | ~frame["model"].isin(main)].reset_index(drop=True)


def perplexities(material: Material) -> pd.DataFrame:
    """Perplexity of every setting on every text that any sparse setting of its model and scope ran, in the main scope.

    Without ``random``, whose thousands to billions would leave the others no room.
    """
    frame = _cells(material, material.quality.perplexity_blocks, text_order)
    sparse = frame[frame["method"] != "dense"]
    pairs = set(zip(sparse["model"], sparse["scope"], sparse["task"], strict=True))
    keep = [key in pairs for key in zip(frame["model"], frame["scope"], frame["task"], strict=True)]
    return _main_scope(frame[np.array(keep, dtype=bool) & (frame["method"] != "random")])


def speed_ups(material: Material) -> pd.DataFrame:
    """Speed-up of every timed sparse row, with the bound at the read bandwidth of the run; dense rows for reference."""
    frame = material.speed
    ok = frame[(frame["status"] == "ok") & frame["speed_up"].notna()]
    columns = [
        *SPEED_SHAPE,
        "method",
        "label",
        "rank",
        "backend",
        "variant",
        "clock",
        "sparsity_target",
        "sparsity_realized",
    ]
    columns += ["latency_us_median", "speed_up", "speed_up_low", "speed_up_high", "bytes_share", "bound", "efficiency"]
    return ok.assign(label=[speed_label(row) for _, row in ok.iterrows()])[columns].reset_index(drop=True)


def efficiencies(material: Material) -> pd.DataFrame:
    """Efficiency of every timed sparse row of a shape that is one of several in its setting."""
    frame = speed_ups(material)
    frame = frame[(frame["method"] != "dense") & (frame["variant"] == "eager") & (frame["level"] != "decode")]
    setting = ["level", "dtype", "batch_size", "threads", "cache", "device_name", "backend", "clock"]
    several = frame.groupby(setting, dropna=False)["model_shape"].transform("nunique") > 1
    columns = [*setting, "model_shape", "method", "label", "sparsity_target", "sparsity_realized", "efficiency"]
    return frame[several.astype(bool)][columns].reset_index(drop=True)


def phases(material: Material) -> pd.DataFrame:
    """Phases of every traced kernel, with the row they belong to; none of a kernel whose clock rate was mismeasured (< 0)."""
    layers = material.speed[material.speed["level"] != "decode"]
    speed = layers[["cell_id", "model_shape", "dtype", "batch_size", "method", "rank", "sparsity_target"]]
    merged = material.results.phases.merge(speed, on="cell_id", how="inner")
    merged = merged[merged.groupby("cell_id")["us_median"].transform("min") >= 0].copy()
    merged["_order"] = merged.groupby("cell_id", sort=False).cumcount()
    merged["_method"] = merged["method"].map(method_order)
    merged = merged.sort_values(["model_shape", "_method", "sparsity_target", "_order"], kind="stable")
    merged["bar"] = [f"{speed_label(row)}, s={row['sparsity_target']:g}" for _, row in merged.iterrows()]
    columns = ["cell_id", "model_shape", "dtype", "batch_size", "bar", "phase", "us_median", "us_q05", "us_q95"]
    return merged.reindex(columns=columns).reset_index(drop=True)


def quality_against_bytes(material: Material) -> pd.DataFrame:
    """Task average, headline perplexity and, where it is of the same model, measured speed-up, by bytes per token."""
    parts = [_main_scope(quality_averages(material)).assign(quantity="average")]
    text = perplexities(material)
    headline = [t for t in dict.fromkeys(text["task"]) if t.startswith("decode_perplexity")][:1]
    parts.append(text[text["task"].isin(headline)].assign(quantity=lambda f: f["task"]))
    models = set(material.quality.ok["model"])
    speed = speed_ups(material)
    speed["model"] = [
        next((m for m in sorted(models) if is_shape_of(material.results, shape, m)), own)
        for own, shape in zip(speed["model"], speed["model_shape"], strict=True)
    ]
    same = speed[speed["model"].isin(models) & (speed["method"] != "dense")]
    measured = same.assign(value=same["speed_up"], ci_low=same["speed_up_low"], ci_high=same["speed_up_high"])
    measured = measured.assign(quantity="speed-up, " + same["level"], mode="practical", scope="")
    columns = ["quantity", *POINT, "value", "ci_low", "ci_high"]
    frames = [part.reindex(columns=columns) for part in (*parts, measured) if not part.empty]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def is_shape_of(results: Results, shape: str, model: str) -> bool:
    """Whether a speed row's shape is a model's own: ``gemma-2-9b`` of ``gemma-2-9b-it``, ``embedded`` of that one."""
    if shape == "embedded":
        config = results.manifest.get("config") or {}
        ids = [one.get("id") for one in config.get("models") or [] if isinstance(one, dict)]
        return ids == ["embedded"]
    return bool(shape) and own_name(model).lower().startswith(shape.lower())


def sparsity_per_layer(material: Material) -> pd.DataFrame:
    """Realised sparsity of every layer, mean over the cells of a setting weighted by their tokens.

    Practical settings; ideal ones, which realise exactly k, only where there is no practical one.
    """
    columns = ["model", "mode", "method", "label", "sparsity_target", "layer", "sparsity_realized"]
    rows = material.quality.rows
    modes = ["practical"] if (rows["mode"] == "practical").any() else ["ideal"]
    cells = rows[rows["mode"].isin(modes)].drop_duplicates("cell_id")
    layers = material.results.sparsity.drop(columns=["sparsity_target"])
    merged = layers.merge(cells[["cell_id", "model", "mode", "method", "label", "sparsity_target"]], on="cell_id")
    if merged.empty:
        return pd.DataFrame(columns=columns)
    merged = merged.assign(
        layer=merged["layer"].astype(int),
        n_tokens=merged["n_tokens"].fillna(1.0),
        weighted=merged["sparsity_realized"] * merged["n_tokens"].fillna(1.0),
    )
    keys = [c for c in columns if c != "sparsity_realized"]
    sums = merged.groupby(keys, sort=True)[["weighted", "n_tokens"]].sum()
    sums = sums[sums["n_tokens"] > 0]
    return (sums["weighted"] / sums["n_tokens"]).rename("sparsity_realized").reset_index()[columns]
