"""The README of the CUDA kernels names every file where it is, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

GPU = Path(__file__).parents[2] / "kernels_numba" / "gpu"


def test_the_table_of_rooms_is_the_tree() -> None:
    text = (GPU / "README.md").read_text(encoding="utf-8")
    room, named = "", set()
    for first, files in re.findall(r"^\| (\S*) ?\| ((?:`\w+\.py`(?:, )?)+) \|", text, re.MULTILINE):
        room = first.strip("`") or room
        named |= {f"{'' if room == '(none)' else room}{name}" for name in re.findall(r"`(\w+\.py)`", files)}
    there = {path.relative_to(GPU).as_posix() for path in GPU.rglob("*.py") if path.name != "__init__.py"}
    assert named == there
