"""Whether a case was faster or slower in one run than in another, from the rounds of both. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

Verdict = Literal["faster", "slower", "no difference", "untested"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
LEVEL = 0.05  # for all cases of a comparison together


def verdicts(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[Verdict]:
    """Verdict on the second timing of each case against the first: Mann-Whitney's test, two-sided.

    `LEVEL` is shared out evenly over the cases that are tested. What differs is what was timed twice: rounds of one run
    say nothing of another day or another machine.

    Parameters
    ----------
    pairs : microseconds of the rounds in both runs; a case of which one side has none, or both so few that no outcome
        could pass the test, is untested
    """
    able = [pair for pair in pairs if all(pair)]
    level = LEVEL / max(1, len(able))
    return [_verdict(old, new, level) for old, new in pairs]


def _verdict(old: Sequence[float], new: Sequence[float], level: float) -> Verdict:
    if not (len(old) and len(new)) or 2 / math.comb(len(old) + len(new), len(old)) > level:
        return "untested"
    from scipy.stats import mannwhitneyu  # late: 1 s

    if min(*old, *new) == max(*old, *new) or mannwhitneyu(old, new).pvalue > level:
        return "no difference"
    return "faster" if mannwhitneyu(old, new, alternative="greater").pvalue < 0.5 else "slower"
