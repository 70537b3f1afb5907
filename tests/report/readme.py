"""Grids of README.md that are parts of a committed report: copied, never typed.

Between a marker ``<!-- table: FILE, WORDS -->`` and ``<!-- end -->`` stand the blocks of a table whose heading holds the words.
``python -m tests.report.readme`` writes them.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
_PLACE = re.compile(r"(<!-- table: ([^,]+), (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """Text with every marked place as the table's file has it.

    Raises
    ------
    FileNotFoundError
        No such table: write the report of its run first.
    ValueError
        No block with these words in its heading.
    """
    return _PLACE.sub(lambda place: f"{place[1]}\n{_blocks(place[2], place[3])}\n{place[4]}", text)


def _blocks(file: str, words: str) -> str:
    _, *blocks = re.split(r"^### ", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [block for block in blocks if words in block.partition("\n")[0]]
    if not found:
        raise ValueError(f"{file} has no block with {words!r} in its heading")
    parts = (block.partition("\n") for block in found)
    return "\n\n".join(f"**{heading.strip()}**\n\n{grid.strip()}" for heading, _, grid in parts) + "\n"


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
