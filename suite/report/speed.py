"""Speed rows with their speed-up over the fastest dense row of the same run and shape, and the byte bound on it."""

from __future__ import annotations

import numpy as np
import pandas as pd

from suite.report.methods import dense_rows, method_order
from suite.report.results import CHOICE, LINE, SHAPE
from suite.report.text import MISSING, fixed, microseconds, shortened

PROBES = ("no-overlap", "deterministic", "trace")  # variants that measure what something costs: in tables, not figures
_USUAL = ("", "low-rank", "mlp")  # a skipped low-rank predictor has no kind: it shares its label with those that ran
MARK = "~"  # beside a time whose rounds were disturbed, by the row's reason


def with_speed_up(speed: pd.DataFrame) -> pd.DataFrame:
    """Add what follows from rows of one run.

    ``against`` names the fastest dense row of the same shape and clock (of any clock where none has the same, and for
    whole models);
    ``speed_up`` is its median latency over the row's, ``speed_up_low`` and ``speed_up_high`` the same between
    quartiles; ``bytes_share`` the row's bytes over dense's; ``bound`` the speed-up that the row would have if it read
    its bytes at the read bandwidth measured in the run, so that efficiency = speed_up / bound. NaN where a row or its
    dense reference is not ok.
    """
    frame = speed.reset_index(drop=True).copy()
    added: list[dict[str, object]] = []
    dense = frame[dense_rows(frame) & (frame["status"] == "ok") & (frame["latency_us_median"] > 0)]
    by_shape: dict[object, pd.DataFrame] = {}
    for key, group in dense.groupby(SHAPE, dropna=False):
        by_shape[key] = group
    for _, row in frame.iterrows():
        same = by_shape.get(tuple(row[SHAPE]))
        if row["status"] != "ok" or same is None or not row["latency_us_median"] > 0:
            added.append({"against": ""})
            continue
        # a token of a whole model is timed as a user would wait for it, whatever the clock
        clocked = same if row["level"] == "decode" else same[same["clock"] == row["clock"]]
        best = (same if clocked.empty else clocked).sort_values("latency_us_median").iloc[0]
        at_bandwidth = row["bytes_read_mib"] * 2**20 / (row["read_bandwidth_gb_s"] * 1e9) * 1e6  # us
        added.append(
            {
                "against": f"{best['backend']} {best['variant']}, {best['clock']}",
                "speed_up": best["latency_us_median"] / row["latency_us_median"],
                "speed_up_low": best["latency_us_q25"] / row["latency_us_q75"],
                "speed_up_high": best["latency_us_q75"] / row["latency_us_q25"],
                # transformers' own loop reads what ours does, which has counted it
                "bytes_share": row["bytes_read_mib"] / same["bytes_read_mib"].max(),
                "bound": best["latency_us_median"] / at_bandwidth,
            }
        )
    numbers = ["speed_up", "speed_up_low", "speed_up_high", "bytes_share", "bound"]
    extra = pd.DataFrame(added, columns=["against", *numbers], index=frame.index)
    extra[numbers] = extra[numbers].astype("float64")
    return pd.concat([frame, extra], axis=1)


def speed_label(row: pd.Series) -> str:
    """Method, and in brackets by what it chooses, as far as it is not usual: ``md-countdown (r=64, block, up)``."""
    parts = [f"r={row['rank']}"] if row["rank"] else []
    parts += [row[name] for name in CHOICE if name != "rank" and row[name] not in _USUAL]
    return f"{row['method']} ({', '.join(parts)})" if parts else str(row["method"])


def speed_labels(rows: pd.DataFrame) -> list[str]:
    """:func:`speed_label` of every row."""
    return [speed_label(row) for _, row in rows[["method", *CHOICE]].iterrows()]


def backend_of(row: pd.Series) -> str:
    """What computed a speed row and how it was timed."""
    return " ".join(str(row[c]) for c in ("backend", "variant", "clock") if row[c])


def panel_title(row: pd.Series) -> str:
    """Shape, level, dtype, batch and threads of a speed row in one line."""
    parts = [row["model_shape"] or row["model"], row["level"], row["dtype"], f"batch {row['batch_size']}"]
    if row["context_tokens"]:
        parts.append(f"context {row['context_tokens']}")
    if row["threads"] not in ("", "0"):  # 0: a GPU
        parts.append(f"{row['threads']} threads")
    if row["cache"] and row["cache"] != "cold":
        parts.append(f"{row['cache']} cache")
    return ", ".join(str(part) for part in parts if part)


def panels(frame: pd.DataFrame) -> list[pd.DataFrame]:
    """Rows by shape, shapes with a result first, methods in print order."""
    ordered = frame.assign(_order=frame["method"].map(method_order))
    groups = [group for _, group in ordered.groupby(SHAPE, sort=True, dropna=False)]
    groups.sort(key=lambda group: not (group["status"] == "ok").any())
    return [g.sort_values(["_order", *LINE, "sparsity_target"]).drop(columns="_order") for g in groups]


def heading(panel: pd.DataFrame) -> str:
    """Title of a shape with its device."""
    first = panel.iloc[0]
    return panel_title(first) + (f" ({first['device_name']})" if first["device_name"] else "")


def mark(row: pd.Series) -> str:
    """What follows the time of a row that is ok, but has a reason to doubt it."""
    return f" {MARK}" if row["status"] == "ok" and row["reason"] else ""


def notes(panel: pd.DataFrame) -> list[str]:
    """What is to be said below a shape's rows: failed, skipped and disturbed ones by their reason."""
    found: dict[str, list[str]] = {}
    for _, row in panel[(panel["status"] != "ok") | (panel["reason"] != "")].iterrows():
        sparsity = "" if np.isnan(row["sparsity_target"]) else f" {row['sparsity_target']:g}"
        reason = str(row["reason"]) or "no reason recorded"
        state = MARK if row["status"] == "ok" else row["status"]
        found.setdefault(f"{state} ({row['backend']}): {reason}", []).append(speed_label(row) + sparsity)
    return [f"{note}: {shortened(which)}." for note, which in found.items()]


def plain_table(frame: pd.DataFrame) -> list[str]:
    """Lines of a table for the terminal, a block per shape; ``frame`` from :func:`with_speed_up`.

    Failed and skipped cases stand in it with their reason, without a time.
    """
    header = ["method", "backend", "sparsity", "realised", "median us", "speed-up", "efficiency", "check", "status"]
    lines = []
    for panel in panels(frame):
        rows = [header]
        for _, row in panel.iterrows():
            state = str(row["status"]) + (f": {row['reason']}" if row["reason"] else "")
            numbers = [fixed(row["sparsity_target"], 2), fixed(row["sparsity_realized"], 3)]
            numbers += [microseconds(row["latency_us_median"]), fixed(row["speed_up"], 2), fixed(row["efficiency"], 2)]
            rows.append([speed_label(row), backend_of(row), *numbers, str(row["check"]) or MISSING, state])
        widths = [max(len(line[i]) for line in rows) for i in range(len(header))]
        lines += ["", heading(panel)]
        lines += ["  ".join(_padded(cells, widths)).rstrip() for cells in rows]
    return [*lines, "", "speed-up: over the fastest dense row; efficiency: needed bytes / (time x read bandwidth)"]


def _padded(cells: list[str], widths: list[int]) -> list[str]:
    """Cells of one line of :func:`plain_table`, numbers to the right."""
    return [c.rjust(w) if 2 <= i <= 6 else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
