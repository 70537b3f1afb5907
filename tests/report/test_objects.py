"""Figures and tables as objects: none without a caption, each name once, data with the columns that are named."""

import re
import sys

import pandas as pd
import pytest

from suite.registry import METHODS
from suite.report.figures import FIGURES
from suite.report.methods import is_dense, is_floor, method_order, sources
from suite.report.objects import Block, Content, ReportFigure, ReportTable
from suite.report.tables import TABLES
from tests.report.parts import OF_ONE_MODEL, material
from tests.report.synthetic import manifest, write_run


@pytest.mark.parametrize("caption", ["", " \n"])
def test_without_a_caption_there_is_neither_figure_nor_table(caption):
    with pytest.raises(ValueError, match="figure 'mine' has no caption"):
        ReportFigure("mine", caption, ["x"], lambda _: pd.DataFrame(), lambda _: None)
    with pytest.raises(ValueError, match="table 'mine' has no caption"):
        ReportTable("mine", "Mine", caption, lambda _: None)


def test_names_are_unique_and_the_page_has_them_in_order(reported):
    for objects in (FIGURES, TABLES):
        names = [one.name for one in objects]
        assert len(set(names)) == len(names)
    page = (reported / "REPORT.md").read_text()
    assert re.findall(r"^!\[(\w+)\]", page, flags=re.M) == [one.name for one in OF_ONE_MODEL]
    for one in OF_ONE_MODEL:
        assert one.caption in page
    written = {path.stem for path in reported.glob("tables/*.md")}
    titles = [one.title for one in TABLES if one.inline and one.name in written]
    assert [title for title in re.findall(r"^### (.*)$", page, flags=re.M) if title in titles] == titles


def test_the_data_of_a_figure_has_the_columns_that_it_names(reported, tmp_path):
    run = material(reported)
    for one in OF_ONE_MODEL:
        frame = one.frame(run)
        assert list(frame.columns) == list(one.columns), one.name
        assert list(pd.read_csv(reported / "figures" / f"{one.name}.csv", nrows=0)) == list(one.columns)
    empty = material(write_run(tmp_path / "empty", manifest=manifest()))
    for one in FIGURES:  # of a run that has nothing yet, too
        assert list(one.frame(empty).columns) == list(one.columns), one.name


def test_a_column_that_the_data_lack_is_an_error():
    one = ReportFigure("mine", "Mine.", ["x", "y"], lambda _: pd.DataFrame({"x": [1]}), lambda _: None)
    with pytest.raises(KeyError, match="y"):
        one.frame(None)


def test_a_table_is_its_caption_its_blocks_and_their_notes():
    blocks = [Block(["a", "b"], [["1", "2"]], "First", ["Noted."]), Block(["a"], [], "Second", ["Nothing timed."])]
    table = ReportTable("mine", "Mine", "Read it so.", lambda _: Content(blocks, "Before.\n\n", "After.\n"))
    first = "### First\n\n| a | b |\n|---|---:|\n| 1 | 2 |\n\nNoted.\n"
    assert table.markdown(None) == (
        f"# Mine\n\nRead it so.\n\nBefore.\n\n{first}\n### Second\n\n\nNothing timed.\n\nAfter.\n"
    )


def test_the_contract_says_what_is_dense_and_what_is_the_floor():
    assert [name for name in METHODS if is_dense(name)] == ["dense"]
    assert [name for name in METHODS if is_floor(name)] == ["random"]


def test_a_method_that_a_file_names_is_not_imported():
    """A run folder may be anybody's."""
    for name in ("antigravity:Method", "given"):
        assert not is_dense(name)
        assert not is_floor(name)
        assert method_order(name)[0] == len(METHODS)
    assert "antigravity" not in sys.modules


def test_published_methods_and_the_suites_own_are_told_apart():
    published, own = sources(
        ["m-countdown-cw", "griffin", "dense", "cats", "m-countdown-cw", "random", "antigravity:Mine"]
    )
    assert published == ["griffin (Dong et al. 2024, arXiv 2404.01365)", "cats (Lee et al. 2024, arXiv 2404.08763)"]
    assert own == ["random", "m-countdown-cw"]
