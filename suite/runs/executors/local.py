"""In this process, one group after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from suite.runs.group import Done, Group, Progress, run_group
from suite.runs.work.base import Worker


def run_here(groups: Iterable[Group], worker: Worker, progress: Progress) -> Iterator[Done]:
    """Run groups, which are made as they are asked for: each knows what those before it have found."""
    for group in groups:
        yield run_group(group, worker, progress)
