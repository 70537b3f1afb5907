"""Figures of decode rows from synthetic runs: tokens per second with their bound, parts of a token, break-even."""

import numpy as np
import pandas as pd
import pytest

from tests.report import parts
from tests.report.parts import figure
from tests.report.synthetic import manifest, speed_row, write_run

DECODE = {"level": "decode", "model": "m", "context_tokens": 128, "backend": "numba-cpu"}


def row(method, sparsity, latency, **more):
    made = speed_row(method, sparsity, latency, **DECODE | more)
    return made | {"tokens_per_s": 1e6 / latency, "cell_id": f"{method}-{sparsity}-{made['variant']}"}


@pytest.fixture
def material(tmp_path):
    rows = [
        row("dense", 0.0, 10000.0, backend="torch", variant="eager"),
        row("dense", 0.0, 8000.0, backend="torch", variant="generate", clock="wall"),
        row("m-countdown", 0.1, 9000.0),
        row("m-countdown", 0.5, 7000.0),
        row("m-countdown", 0.9, 5000.0),
        row("cats", 0.5, 6000.0),
        row("cats", 0.9, 5500.0),
        row("d-countdown", 0.5, 9000.0),
    ]
    run = write_run(tmp_path / "run", speed=rows, manifest=manifest())
    times = [("attention", 1000), ("MLP", 5000), ("head", 500), ("rest", 2500)]
    cells = [
        (made["cell_id"], part, time, "", "") for made in rows if made["variant"] != "generate" for part, time in times
    ]
    columns = ["cell_id", "phase", "us_median", "us_q05", "us_q95"]
    pd.DataFrame(cells, columns=columns).to_csv(run / "phases.csv", index=False)
    return parts.material(run)


def test_bound_is_bandwidth_over_bytes(material):
    found = figure("decode_tokens").frame(material)
    speed = material.speed
    one = found[(found["method"] == "m-countdown") & (found["sparsity_target"] == 0.9)].iloc[0]
    raw = speed[(speed["method"] == "m-countdown") & (speed["sparsity_target"] == 0.9)].iloc[0]
    assert one["tokens_per_s"] == pytest.approx(200)
    assert one["bound_tokens_per_s"] == pytest.approx(
        raw["read_bandwidth_gb_s"] * 1e9 / (raw["bytes_read_mib"] * 2**20)
    )
    assert one["speed_up"] == pytest.approx(8 / 5)  # against the fastest dense, whatever timed it


def test_break_even_lies_where_the_speed_up_passes_one(material):
    found = figure("break_even").frame(material).set_index("method")
    assert found.loc["m-countdown", "at"] == pytest.approx(0.1 + 0.4 * (1 - 8 / 9) / (8 / 7 - 8 / 9), abs=0.02)
    assert not found.loc["m-countdown", "below"]
    assert found.loc["cats", "at"] == pytest.approx(0.5, abs=0.02)
    assert found.loc["cats", "below"]
    assert np.isnan(found.loc["d-countdown", "at"])  # never faster: no number


def test_break_even_of_layers_by_batch(tmp_path):
    """Rows of probes and of other clocks, and lines of fewer than four sparsities, say nothing."""
    rows = []
    for batch, factor in (("1", 1.0), ("4", 1.6)):
        more = {"level": "layer", "backend": "numba-cuda", "clock": "graph", "batch_size": batch}
        rows.append(speed_row("dense", 0.0, 100.0, **more | {"backend": "torch"}))
        rows += [speed_row("cats", s, factor * (120 - 100 * s), **more) for s in (0.0, 0.3, 0.6, 0.9)]
        rows += [speed_row("cats", s, 1.0, **more | {"variant": "trace"}) for s in (0.0, 0.3, 0.6, 0.9)]
        rows += [speed_row("m-countdown", s, 1.0, **more) for s in (0.3, 0.6, 0.9)]
    run = write_run(tmp_path / "run", speed=rows, manifest=manifest())
    found = figure("break_even").frame(parts.material(run))
    assert list(found["method"]) == ["cats", "cats"]
    assert list(found["at"]) == pytest.approx([0.18, 0.564], abs=1e-3)


def test_parts_stand_with_their_row(material):
    found = figure("decode_phases").frame(material)
    assert list(dict.fromkeys(found["bar"])) == [
        "dense", "cats, s=0.5", "cats, s=0.9", "m-countdown, s=0.1", "m-countdown, s=0.5", "m-countdown, s=0.9",
        "d-countdown, s=0.5",
    ]  # fmt: skip
    assert figure("phases").frame(material).empty  # that one is of layers


@pytest.mark.parametrize("name", ["decode_tokens", "decode_phases", "break_even"])
def test_figures_are_drawn(name, material, tmp_path):
    one = figure(name)
    one.drawn(one.frame(material)).savefig(tmp_path / f"{name}.png")
    assert (tmp_path / f"{name}.png").stat().st_size > 5000
    empty = write_run(tmp_path / "other", speed=[speed_row("dense", 0.0, 5.0)], manifest=manifest())
    assert one.drawn(one.frame(parts.material(empty))) is None
