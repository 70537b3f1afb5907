"""What this suite expects of its own methods and checks in every run; the paper's claims stand apart, in claims.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from suite.evaluation.tasks import DECODE_PERPLEXITY
from suite.report.comparisons import Comparison, compared_texts
from suite.report.quality import Average, Quality
from suite.report.task_names import text_order

SPARSITY, MODE = 0.8, "practical"
# (lower perplexity, higher): whatever knows more of v ranks better by it
ORDER = (
    ("md-countdown", "m-countdown-cw"),
    ("m-countdown-cw", "m-countdown"),
    ("md-countdown", "chess"),
    ("chess", "cats"),
)


@dataclass(frozen=True)
class Checked:
    """One expected order on one text; ``found`` is the paired log-ratio of the first to the second."""

    model: str
    first: Average
    second: Average
    found: Comparison

    @property
    def verdict(self) -> str:
        """Whether the first has the lower perplexity, and whether the interval settles it."""
        value, low, high = self.found.found
        settled = low is not None and high is not None and (low > 0 or high < 0)
        return ("as expected" if value < 0 else "not as expected") + ("" if settled else " (not settled)")


def checked(quality: Quality) -> Iterator[Checked]:
    """Every order that a run has both methods of, on every text that generation is measured on.

    Where a method was run at several ranks, the largest: what is expected of md-countdown is of a rank of d_model / 8 at least.
    """
    for block, settings in quality.perplexity_blocks:
        if block["mode"] != MODE or block["sparsity_target"] != SPARSITY:
            continue
        for names in ORDER:
            first, second = (_largest(settings, name) for name in names)
            for one in first:
                for other in second:
                    for found in sorted(
                        compared_texts(quality, one, other), key=lambda found: text_order(found.column)
                    ):
                        if found.column.startswith(DECODE_PERPLEXITY):
                            yield Checked(str(block["model"]), one, other, found)


def _largest(settings: list[Average], method: str) -> list[Average]:
    """Settings of a method of the largest rank: several where they differ in something else."""
    own = [one for one in settings if one.method == method]
    rank = max((float(one.setting["rank"] or 0) for one in own), default=0.0)
    return [one for one in own if float(one.setting["rank"] or 0) == rank]
