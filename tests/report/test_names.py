"""Names of models, methods and tasks may hold what Markdown, HTML or mathtext would read as their own."""

from __future__ import annotations

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from suite.report import style
from suite.report.page import write_report
from suite.report.rebuild import rebuild_problems
from suite.report.text import markdown_table
from tests.report import parts
from tests.report.synthetic import MODEL, hand_run, hits

DENSE = ("dense", "none", 0.0, 0.0)


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", r"$\frac{", "a|b", r"$\frac{$"])
def test_a_model_of_any_name(tmp_path, name):
    answers = {
        DENSE: {"a": hits(90), "b_perplexity": [1.0] * 9},
        ("cats", "ideal", 0.5, 0.5): {"a": hits(80), "b_perplexity": [1.5] * 9},
        ("m-countdown", "ideal", 0.5, 0.5): {"a": hits(70), "b_perplexity": [1.25] * 9},
    }
    run = hand_run(tmp_path, answers)
    frame = pd.read_csv(run / "accuracy.csv", dtype=str, keep_default_na=False)
    assert set(frame["model"]) == {MODEL}
    frame.loc[frame["method"] == "cats", "reason"] = name  # a reason stands in a table, too
    frame.loc[frame["method"] == "cats", "status"] = "failed"
    frame.loc[frame["method"] == "cats", ["value", "stderr", "sparsity_realized", "delta_dense"]] = ""
    frame.assign(model=name).to_csv(run / "accuracy.csv", index=False)
    page = write_report(run).read_text()
    assert rebuild_problems(run) == []
    assert list(run.glob("figures/*.png"))
    for text in (page, *(path.read_text() for path in run.glob("tables/*.md"))):
        assert "<" not in text
        assert ">" not in text
        for block in text.split("\n\n"):
            bars = {line.count("|") for line in block.splitlines() if line.startswith("|")}
            assert len(bars) <= 1, block
    shown = name.replace("<", "&lt;").replace(">", "&gt;")
    assert shown in page  # in headings a bar is no more than a bar
    assert shown.replace("|", "&#124;") in page


def test_a_cell_has_no_bar_and_no_line_break():
    assert markdown_table(["a|b", "c"], [["d\ne", "|"]]) == "| a&#124;b | c |\n|---|---:|\n| d e | &#124; |\n"


def test_no_figure_shows_mathtext_as_it_is_written(reported):
    n_log = 0
    for path in sorted(reported.glob("figures/*.csv")):
        figure = parts.figure(path.stem).drawn(pd.read_csv(path))
        if figure is None or not any(axes.get_yscale() == "log" for axes in figure.axes):
            continue
        n_log += 1
        with style.styled():
            FigureCanvasAgg(figure).draw()
        for text in figure.findobj(Text):
            assert "$" not in text.get_text(), path
    assert n_log >= 3
