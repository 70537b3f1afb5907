"""Speed rows: reference, bound, efficiency, rows without a time."""

import numpy as np
import pytest

from suite.report.page import write_report
from suite.report.results import load_results
from suite.report.speed import plain_table, with_speed_up
from suite.speed.case import DISTURBED
from tests.report.parts import figure, material, table_text
from tests.report.synthetic import manifest, speed_row, write_run


def frame(tmp_path, *rows):
    return with_speed_up(load_results(write_run(tmp_path / "run", speed=list(rows), manifest=manifest())).speed)


def by(found, method, **wanted):
    for column, value in {"method": method, **wanted}.items():
        found = found[found[column] == value]
    assert len(found) == 1
    return found.iloc[0]


def test_the_reference_is_the_fastest_dense_of_the_same_shape_and_clock(tmp_path):
    found = frame(
        tmp_path,
        speed_row("dense", 0.0, 100.0, variant="eager", clock="event"),
        speed_row("dense", 0.0, 90.0, variant="graph", clock="graph"),
        speed_row("dense", 0.0, 50.0, variant="graph", clock="graph", dtype="bfloat16"),
        speed_row("dense", 0.0, 10.0, variant="compile", clock="graph", status="failed", reason="check"),
        speed_row("cats", 0.9, 45.0, clock="graph"),
        speed_row("m-countdown", 0.9, 45.0, clock="event"),
        speed_row("given", 0.9, 45.0, clock="wall"),
    )
    assert (by(found, "cats")["speed_up"], by(found, "cats")["against"]) == (2.0, "torch graph, graph")
    assert by(found, "m-countdown")["speed_up"] == pytest.approx(100 / 45)
    assert by(found, "given")["speed_up"] == 2.0  # no dense row of this clock: the fastest of any
    assert np.isnan(by(found, "dense", status="failed")["speed_up"])


def test_bound_times_efficiency_is_the_speed_up(tmp_path):
    found = frame(tmp_path, speed_row("dense", 0.0, 50000.0), speed_row("m-countdown", 0.9, 18000.0))
    row = by(found, "m-countdown")
    assert row["bound"] * row["efficiency"] == pytest.approx(row["speed_up"], rel=1e-12)
    assert row["bytes_share"] == pytest.approx((3 - 1.8) / 3)
    # quartiles of the fixture: .98 and 1.03 of the median
    assert row["speed_up_low"] == pytest.approx(0.98 / 1.03 * row["speed_up"])
    assert row["speed_up_high"] == pytest.approx(1.03 / 0.98 * row["speed_up"])


def test_failed_and_skipped_rows_have_a_reason_and_no_time(tmp_path):
    frame(
        tmp_path,
        speed_row("dense", 0.0, 50.0),
        speed_row("cats", 0.9, 20.0) | {"status": "failed", "reason": "error 3e-2 above 1e-5"},
        speed_row("m-countdown", 0.9, 20.0, backend="numba-cuda", device_name="")
        | {"status": "skipped", "reason": "no CUDA device", "latency_us_median": ""},
        speed_row("given", 0.9, 10.0),
    )
    for table in (table_text(tmp_path / "run", name) for name in ("speed", "speed_rows")):
        assert "failed (numba-cpu): error 3e-2 above 1e-5: cats 0.9." in table
        assert "skipped (numba-cuda): no CUDA device: m-countdown 0.9." in table
        assert "5.00" in table
        assert "| cats" not in table


def test_rows_that_choose_in_another_way_are_lines_of_their_own(tmp_path):
    """One rank, but another exact projection, another input, another kind of predictor: no row is another's."""
    common = {"rank": 64, "level": "decode", "model": "m", "context_tokens": 128, "tokens_per_s": 1.0}
    labels = {
        "md-countdown (r=64, up)": {"predictor_input": "mlp", "exact_projection": "up"},
        "md-countdown (r=64, block, gate)": {"predictor_input": "block", "exact_projection": "gate"},
        "md-countdown (r=64, auto)": {"predictor_input": "mlp", "exact_projection": "auto"},
        "d-countdown (r=64)": {"predictor": "low-rank"},
        "d-countdown (r=64, gated)": {"predictor": "gated", "predictor_input": "mlp"},
        "d-countdown (r=64, gated, block)": {"predictor": "gated", "predictor_input": "block"},
    }
    rows = [speed_row("dense", 0.0, 100.0, **common | {"rank": ""})]
    for number, (label, more) in enumerate(labels.items()):
        times = ((s, 100 / (1.1 + number + s)) for s in (0.5, 0.9))
        made = [speed_row(label.split()[0], s, time, **common | more) for s, time in times]
        rows += [row | {"cell_id": f"{number}-{row['sparsity_target']}"} for row in made]
    frame(tmp_path, *rows)
    run = tmp_path / "run"
    by_sparsity = [line for line in table_text(run, "speed").splitlines() if line.startswith(("| md-", "| d-"))]
    assert len(by_sparsity) == len(labels)
    for number, label in enumerate(labels):
        (line,) = [line for line in by_sparsity if line.startswith(f"| {label}, ")]
        assert all(f"{1.1 + number + s:.2f} (" in line for s in (0.5, 0.9))
    every = [line for line in table_text(run, "speed_rows").splitlines() if line.startswith(("| md-", "| d-"))]
    assert {line.split(" | ")[0][2:] for line in every} == set(labels)
    for name in ("decode_tokens", "break_even"):
        drawn = figure(name).frame(material(run))
        assert set(drawn["label"]) - {"dense"} == set(labels)
    assert all(f"{label} " in write_report(run).read_text() for label in labels)  # the finding names the best of each


def test_no_dense_row_no_speed_up(tmp_path):
    found = frame(tmp_path, speed_row("cats", 0.9, 20.0))
    assert np.isnan(found["speed_up"].iloc[0])
    assert "| cats" in table_text(tmp_path / "run", "speed_rows")


def test_the_headline_is_held_against_the_fastest_dense_of_the_graph_clock(tmp_path):
    """Launch by launch dense is slower; a probe is not a result."""
    rows = [
        speed_row("dense", 0.0, 200.0, clock="event"),
        speed_row("dense", 0.0, 90.0, variant="compile", clock="graph"),
        speed_row("m-countdown", 0.9, 50.0, clock="event"),
        speed_row("m-countdown", 0.9, 45.0, clock="graph"),
        speed_row("m-countdown", 0.9, 30.0, clock="graph", variant="trace"),
    ]
    run = write_run(tmp_path / "run", speed=rows, manifest=manifest())
    page = write_report(run).read_text()
    assert "over the fastest dense (torch compile, graph) m-countdown 2.00x at 0.9." in page
    claims = load_results(run).claims
    own = claims[(claims["claim"] == "C3") & (claims["verdict"] == "consistent")]
    assert sorted(own["value"].round(3)) == [2.0, 4.0]
    assert page.count("| llama-3.1-8b, layer, float32, batch 1") == 2  # what was timed tells the rows apart


def test_a_dense_row_that_counted_no_bytes_may_be_the_fastest(tmp_path):
    found = frame(
        tmp_path,
        speed_row("dense", 0.0, 100.0),
        speed_row("dense", 0.0, 90.0, variant="generate") | {"bytes_read_mib": "", "efficiency": ""},
        speed_row("m-countdown", 0.9, 45.0),
    )
    row = by(found, "m-countdown")
    assert row["speed_up"] == 2.0
    assert row["bytes_share"] == pytest.approx((3 - 1.8) / 3)


def test_a_disturbed_time_is_marked_wherever_it_is_shown(tmp_path):
    found = frame(
        tmp_path,
        speed_row("dense", 0.0, 50.0),
        speed_row("cats", 0.9, 20.0) | {"reason": DISTURBED},
        speed_row("given", 0.9, 10.0),
    )
    table, rows = (table_text(tmp_path / "run", name) for name in ("speed", "speed_rows"))
    terminal = plain_table(found)
    assert f"~ (numba-cpu): {DISTURBED}: cats 0.9." in table
    assert f"~ (numba-cpu): {DISTURBED}: cats 0.9." in rows
    marked = [line for line in (*table.splitlines(), *rows.splitlines()) if line.startswith("|") and " ~ |" in line]
    assert [line[:6] for line in marked] == ["| cats"] * 2
    assert [line.split()[0] for line in terminal if line.endswith(f"ok: {DISTURBED}")] == ["cats"]


def test_a_disturbed_dense_reference_is_marked(tmp_path):
    frame(tmp_path, speed_row("dense", 0.0, 50.0) | {"reason": DISTURBED}, speed_row("given", 0.9, 10.0))
    assert "50.0 us ~ |" in table_text(tmp_path / "run", "speed")
