"""A figure and a table of the report: each one object that holds all there is to know about it; none without a caption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib.figure as mpl
import pandas as pd

from suite.report.material import Material
from suite.report.style import styled
from suite.report.text import markdown_table


@dataclass(frozen=True)
class ReportFigure:
    """A figure: what it shows, the numbers behind it, and how they are drawn.

    Parameters
    ----------
    name : str
        Stem of its files below ``figures/``.
    caption : str
        What a reader must know to read it, in Markdown.
    columns : sequence of str
        Columns of its data, in order: those of ``figures/<name>.csv``.
    data : callable
        Makes the data, one row a point or bar, with these columns at least; no rows where a run has nothing to show.
    draw : callable
        Draws the data and nothing else; None where they hold nothing that can be drawn.

    Raises
    ------
    ValueError
        No caption.
    """

    name: str
    caption: str
    columns: Sequence[str]
    data: Callable[[Material], pd.DataFrame]
    draw: Callable[[pd.DataFrame], mpl.Figure | None]

    def __post_init__(self) -> None:
        _refuse_without_caption("figure", self.name, self.caption)

    def frame(self, material: Material) -> pd.DataFrame:
        """Data of a run, with exactly :attr:`columns`."""
        return self.data(material)[list(self.columns)].reset_index(drop=True)

    def drawn(self, frame: pd.DataFrame) -> mpl.Figure | None:
        """The figure in the report's style; None where there is nothing to draw."""
        if frame.empty:
            return None
        with styled():
            return self.draw(frame)

    def markdown(self) -> str:
        """The figure in REPORT.md: image, caption and links to its other files."""
        path = f"figures/{self.name}"
        return f"![{self.name}]({path}.png)\n\n{self.caption} Data: [CSV]({path}.csv); [SVG]({path}.svg).\n"


@dataclass(frozen=True)
class Block:
    """One grid of a table: rows of text under their columns; no grid where there are no rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    heading: str = ""
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """Heading, grid and notes."""
        heading = f"### {self.heading}\n\n" if self.heading else ""
        grid = markdown_table(self.columns, self.rows) if self.rows else ""
        return heading + grid + "".join(f"\n{note}\n" for note in self.notes)


@dataclass(frozen=True)
class Content:
    """What a table holds for one run: its blocks, and text of this run before and after them.

    ``captioned`` is False where there is nothing that the caption could explain.
    """

    blocks: Sequence[Block]
    before: str = ""
    after: str = ""
    captioned: bool = True


@dataclass(frozen=True)
class ReportTable:
    """A table: what it shows, and its blocks for a run.

    Parameters
    ----------
    name : str
        Stem of its file below ``tables/``.
    title, caption : str
        Heading, and what a reader must know to read it, in Markdown.
    content : callable
        Makes the blocks; None where a run has nothing for it, which then has no such table.
    inline : bool
        Whether REPORT.md holds it; else it links to the file.
    is_open : bool
        Whether an empty line follows the last block.

    Raises
    ------
    ValueError
        No caption.
    """

    name: str
    title: str
    caption: str
    content: Callable[[Material], Content | None]
    inline: bool = True
    is_open: bool = True

    def __post_init__(self) -> None:
        _refuse_without_caption("table", self.name, self.caption)

    def markdown(self, material: Material) -> str:
        """The table of a run, "" where it has none."""
        content = self.content(material)
        if content is None:
            return ""
        text = f"# {self.title}\n\n" + (f"{self.caption}\n\n" if content.captioned else "") + content.before
        blocks = "\n".join(block.markdown() for block in content.blocks)
        return text + blocks + ("\n" if content.blocks and self.is_open else "") + content.after


def _refuse_without_caption(kind: str, name: str, caption: str) -> None:
    if not caption.strip():
        raise ValueError(f"{kind} {name!r} has no caption: write what a reader must know to read it")
