"""Tables of speed rows: speed-ups by sparsity, and every timed row with all that was measured."""

from __future__ import annotations

import math

import pandas as pd

from suite.report.material import Material
from suite.report.methods import dense_rows
from suite.report.objects import Block, Content, ReportTable
from suite.report.results import LINE
from suite.report.speed import backend_of, heading, mark, notes, panels, speed_label
from suite.report.style import DENSE
from suite.report.text import MISSING, fixed, microseconds


def speed_ups(material: Material) -> Content | None:
    """Speed-up (efficiency) of every method by sparsity, a block per shape."""
    frame = material.speed
    return None if frame.empty else Content([_by_sparsity(panel) for panel in panels(frame)])


def _by_sparsity(panel: pd.DataFrame) -> Block:
    is_ok, is_dense = panel["status"] == "ok", dense_rows(panel)
    ok, dense = panel[is_ok & ~is_dense], panel[is_ok & is_dense].sort_values("latency_us_median")
    sparsities = sorted(set(ok["sparsity_target"].dropna()))
    rows = []
    if not dense.empty:
        best = dense.iloc[0]
        note = (
            f"{DENSE} ({best['backend']} {best['variant']}): {microseconds(best['latency_us_median'])} us{mark(best)}"
        )
        rows.append([note, "1.00", fixed(best["efficiency"], 2), *[MISSING] * len(sparsities)])
    for _, line in ok.groupby(LINE, sort=False, dropna=False):
        first = line.iloc[0]
        values = {r["sparsity_target"]: r for _, r in line.iterrows()}
        rows.append(
            [f"{speed_label(first)}, {backend_of(first)}", "", "", *(_speed_up(values.get(s)) for s in sparsities)]
        )
    columns = ["method", "speed-up", "efficiency", *(f"s={s:g}" for s in sparsities)]
    return Block(columns, rows, heading(panel), notes(panel))


def _speed_up(row: pd.Series | None) -> str:
    if row is None or not math.isfinite(row["speed_up"]):
        return MISSING
    return f"{row['speed_up']:.2f} ({fixed(row['efficiency'], 2)}){mark(row)}"


_ROW_COLUMNS = ["method", "sparsity", "realised", "backend", "median", "quartiles", "speed-up", "between quartiles"]
_ROW_COLUMNS += ["bytes", "bound", "efficiency", "extra MiB", "max rel error", "against"]


def speed_rows(material: Material) -> Content | None:
    """Every timed row: latency, quartiles, speed-up, bound, efficiency, memory."""
    frame = material.speed
    if frame.empty:
        return None
    blocks = []
    for panel in panels(frame):
        rows = [_row(row) for _, row in panel[panel["status"] == "ok"].iterrows()]
        blocks.append(Block(_ROW_COLUMNS, rows, heading(panel), notes(panel)))
    return Content(blocks)


def _row(row: pd.Series) -> list[str]:
    return [
        speed_label(row),
        fixed(row["sparsity_target"], 2),
        fixed(row["sparsity_realized"], 3),
        backend_of(row),
        microseconds(row["latency_us_median"]) + mark(row),
        f"{microseconds(row['latency_us_q25'])} to {microseconds(row['latency_us_q75'])}",
        fixed(row["speed_up"], 2),
        f"{fixed(row['speed_up_low'], 2)} to {fixed(row['speed_up_high'], 2)}",
        fixed(row["bytes_share"], 3),
        fixed(row["bound"], 2),
        fixed(row["efficiency"], 2),
        fixed(row["extra_memory_mib"], 1),
        f"{row['max_rel_error']:.1e}" if math.isfinite(row["max_rel_error"]) else MISSING,
        str(row["against"]) or MISSING,
    ]


TABLES = (
    ReportTable(
        "speed",
        "Speed",
        "Speed-up against the fastest dense row of the same run, shape and clock; in brackets the efficiency: needed bytes "
        "over time x the read bandwidth measured in the same run. Bytes and quartiles stand in `speed_rows`. A row whose "
        "check failed has no time.",
        speed_ups,
    ),
    ReportTable(
        "speed_rows",
        "Speed, row by row",
        "Latencies in microseconds. Bytes: the row's over dense's. Bound: the speed-up at the read bandwidth measured in "
        "the run; efficiency = speed-up / bound.",
        speed_rows,
        inline=False,
    ),
)
